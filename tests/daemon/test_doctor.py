"""The doctor: each thing that may be wrong, and how it looks when it is not."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from isthmus.common.errors import ConfigError, KeyFileError, UnreachableError
from isthmus.daemon import doctor
from isthmus.daemon.cloud_check import check_clouds
from isthmus.daemon.daemon_lock import occupied
from isthmus.daemon.daemon_settings import EXPORT_NO_PROXY
from isthmus.daemon.doctor import Finding, examine
from isthmus.daemon.home import Home
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.owners import first_owner
from isthmus.edge.config.client_config import ClientConfig
from isthmus.protocol.secure.keys import generate_edge

CLOUD = '[clouds.main]\ncloud = "isthmus://127.0.0.1:1#SHA256:x"\n'
LISTEN = 'listen = "127.0.0.1:0"\n'


@pytest.fixture(autouse=True)
def clouds(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a cloud answers; to be changed by a test."""
    said: dict[str, Any] = {"model": "smollm2", "plan": "2:2"}
    monkeypatch.setattr(doctor, "check_clouds", lambda clouds: dict.fromkeys(clouds, said))
    return said


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home.make(tmp_path / "home")
    database = Database(home.database)
    first_owner(database, home.token)
    database.close()
    return home


def _found(home: Home, text: str = LISTEN + CLOUD, **environment: str) -> dict[str, Finding]:
    (home.path.parent / "daemon.toml").write_text(text)
    found = {finding.check: finding for finding in examine(home, home.path.parent / "daemon.toml", environment)}
    assert all(bool(finding.remedy) == (not finding.ok) for finding in found.values())
    assert all("\n" not in finding.said for finding in found.values())
    return found


def _wrong(found: dict[str, Finding]) -> list[str]:
    return [name for name, finding in found.items() if not finding.ok]


def test_where_all_is_well_it_says_so(home: Home) -> None:
    found = _found(home)
    assert _wrong(found) == []
    checks = ["versions", "settings", "home", "token", "disk", "port", "daemon", "proxy", "cloud main"]
    assert list(found) == checks
    assert found["cloud main"].line() == "ok    cloud main: serves smollm2 (2:2), and takes the key"


def test_before_the_first_start_all_is_well_but_for_the_missing_cloud(tmp_path: Path) -> None:
    assert _wrong(_found(Home(tmp_path / "home"), LISTEN)) == ["clouds"]
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("text", ["lisen = 1", 'listen = "0.0.0.0:1"'])
def test_settings_that_make_no_sense(home: Home, text: str) -> None:
    assert _wrong(_found(home, text + "\n" + CLOUD))[0] == "settings"


def test_a_home_that_others_may_enter(home: Home) -> None:
    home.path.chmod(0o755)
    assert _wrong(_found(home)) == ["home"]
    assert "chmod 700" in _found(home)["home"].remedy


def test_a_token_that_others_may_read(home: Home) -> None:
    home.token.chmod(0o644)
    assert _wrong(_found(home)) == ["token"]


def test_a_home_that_is_almost_full(home: Home) -> None:
    (home.path / "files" / "x").write_bytes(bytes([1]) * (1 << 20))
    assert _wrong(_found(home, "disk_gib = 0.001\n" + LISTEN + CLOUD)) == ["disk"]


def test_a_disk_that_is_almost_full(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LEAST_FREE", 1 << 60)
    assert _wrong(_found(home)) == ["disk"]


def test_a_port_that_is_taken(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f'listen = "127.0.0.1:{taken.getsockname()[1]}"\n'
        assert _wrong(_found(home, listen + CLOUD)) == ["port"]


def test_a_daemon_that_does_not_answer(home: Home) -> None:
    with occupied(home):
        found = _found(home)
    assert _wrong(found) == ["daemon"]
    assert "isthmus edge daemon logs" in found["daemon"].remedy


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "all_proxy"])
def test_a_proxy_that_would_be_told_everything(home: Home, name: str) -> None:
    proxy = {name: "http://proxy:3128"}
    for more in ({}, {"NO_PROXY": "example.org"}, {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "localhost"}):
        found = _found(home, **proxy, **more)
        assert _wrong(found) == ["proxy"]
        assert EXPORT_NO_PROXY in found["proxy"].remedy
    for more in ({"NO_PROXY": "x, 127.0.0.1 ,localhost"}, {"no_proxy": "*"}, {"NO_PROXY": "localhost,127.0.0.1"}):
        assert _wrong(_found(home, **proxy, **more)) == []
    assert _wrong(_found(home, **{name: ""})) == []


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(30, "keygen"), (32, "enroll"), (31, "do not go on"), (40, "address"), (1, "code 1"), (10, "[clouds.main]")],
)
def test_a_cloud_that_is_not_to_be_had(home: Home, clouds: dict[str, Any], code: int, remedy: str) -> None:
    clouds.update(code=code, message="it is so")
    found = _found(home)
    assert _wrong(found) == ["cloud main"]
    assert found["cloud main"].said == "it is so"
    assert remedy in found["cloud main"].remedy


@pytest.mark.long
def test_a_process_of_its_own_asks_the_clouds(tmp_path: Path) -> None:
    key = tmp_path / "key"
    generate_edge(key, "doctor")
    pinned = f"isthmus://127.0.0.1:1#SHA256:{'A' * 43}"
    clouds = {
        "keyless": ClientConfig(cloud=pinned, key=tmp_path / "no_key"),
        "away": ClientConfig(cloud=pinned, key=key, connect_timeout=0.1),
        "misspelt": ClientConfig(cloud="isthmus://127.0.0.1:1#SHA256:x", key=key),
    }
    said = check_clouds(clouds)
    errors = {"keyless": KeyFileError, "away": UnreachableError, "misspelt": ConfigError}
    assert {name: each["code"] for name, each in said.items()} == {
        name: error.exit_code for name, error in errors.items()
    }
    assert "no_key" in said["keyless"]["message"]
