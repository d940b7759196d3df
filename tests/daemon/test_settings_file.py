"""daemon.toml: what is in it, where its paths lead, and what is said of a mistake."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from isthmus.common.errors import ConfigError
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.settings_file import example, read_daemon_settings
from isthmus.edge.config.client_config import ClientConfig


def _read(folder: Path, text: str, **changes: Any) -> DaemonSettings:
    (folder / "daemon.toml").write_text(text, encoding="utf-8")
    return read_daemon_settings(folder / "daemon.toml", changes)


def test_without_a_file_everything_is_by_default() -> None:
    settings = read_daemon_settings(None)
    assert settings == DaemonSettings()
    assert settings.address == ("127.0.0.1", 7465)


def test_paths_are_of_the_files_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    text = """
        tls_cert = "cert.pem"
        tls_key = "/etc/key.pem"
        offered_draft = "package"
        [clouds.main]
        cloud = "cloud.txt"
        key = "~/key"
        tls_ca = "ca.pem"
        [clouds.other]
        cloud = "isthmus://a:1#SHA256:x"
        codec = "int8"
    """
    monkeypatch.chdir("/")
    settings = _read(tmp_path, text)
    main, other = settings.clouds["main"], settings.clouds["other"]
    assert (settings.tls_cert, settings.tls_key) == (tmp_path / "cert.pem", Path("/etc/key.pem"))
    assert settings.offered_draft == str(tmp_path / "package")
    assert (main.cloud, main.key, main.tls_ca) == (
        str(tmp_path / "cloud.txt"),
        Path("/somebody/key"),
        tmp_path / "ca.pem",
    )
    assert (other.cloud, other.codec, other.key) == ("isthmus://a:1#SHA256:x", "int8", None)
    assert _read(tmp_path, 'offered_draft = "ngram"').offered_draft == "ngram"


def test_a_flag_wins_over_the_file(tmp_path: Path) -> None:
    assert _read(tmp_path, 'listen = "127.0.0.1:1"', listen="127.0.0.1:2").listen == "127.0.0.1:2"
    assert _read(tmp_path, 'listen = "127.0.0.1:1"', listen=None).listen == "127.0.0.1:1"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lisen = 1", "unknown setting 'lisen' .*did you mean 'listen'"),
        ("[clouds.a]\ncloud = 'x'\ncodex = 'int8'", "unknown setting 'clouds.a.codex' .*did you mean 'clouds.a.codec'"),
        ("[clouds.a]", "clouds.a.cloud is missing. Connection string"),
        ("listen = '127.0.0.1'", "listen = '127.0.0.1': it is no address and port.*Address and port"),
        ("listen = '127.0.0.1:99999'", "listen = "),
        ("jobs_at_once = 0", "jobs_at_once = 0: .*greater than or equal to 1.*Jobs that run"),
        ("[clouds.a]\ncloud = 'x'\nmax_fetch_gib = -1", "clouds.a.max_fetch_gib = -1"),
        ("[clouds.'a b']\ncloud = 'x'", "'a b' is no cloud's name"),
        ("hosts = ['http://x']", "'http://x' is no host's name"),
        ("clouds = 3", "clouds = 3"),
        ("tls_cert = 'x'", "tls_cert and tls_key go together"),
        ("training_layers = 'some'", "training_layers = 'some'"),
        ("disk_gib = nan", "disk_gib = nan"),
        ("offered_draft = 3", "offered_draft = 3"),
        ("listen = ", "is not TOML"),
    ],
)
def test_a_mistake_is_said_in_one_line_with_its_key(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        _read(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert "daemon.toml" in str(caught.value)


def test_every_setting_has_its_description() -> None:
    assert [name for name, field in DaemonSettings.model_fields.items() if not field.description] == []


def test_the_example_has_every_setting_with_its_default(tmp_path: Path) -> None:
    text = example()
    assert tomllib.loads(text) == {}
    whole = re.sub(r"^#(?=[a-z\[])", "", text, flags=re.MULTILINE)
    values = tomllib.loads(whole)
    assert set(values) == set(DaemonSettings.model_fields)
    assert set(values["clouds"]["main"]) == set(ClientConfig.model_fields)
    settings = _read(tmp_path, whole).model_copy(update={"clouds": {}, "tls_cert": None, "tls_key": None})
    assert settings == DaemonSettings()
    assert max(map(len, text.splitlines())) <= 110
