"""The commands of the daemon, against one that runs, and where none does."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.commands import in_process, refused
from support.daemon import warm_daemon
from support.daemon.running_daemon import RunningDaemon, running_daemon
from support.warm_processes import WarmPopen
from typer.testing import CliRunner

from isthmus.cli import daemon_commands
from isthmus.cli.main import app
from isthmus.common.errors import ConfigError, NotRunningError, PortInUseError, StateError
from isthmus.daemon import daemon_lock, daemon_server as server
from isthmus.daemon.daemon_lock import holder, occupied
from isthmus.daemon.home import Home
from isthmus.daemon.state.migrate import copy_of
from isthmus.daemon.state.owners import READ_EVERY
from isthmus.daemon.tokens import HUB, hash_of

runner = CliRunner()


def _run(*words: str, fails: type[Exception] | None = None) -> str:
    """What a command prints; the error that it ends with where it `fails`."""
    done = runner.invoke(app, ["edge", "daemon", *words])
    if fails is not None:
        assert isinstance(done.exception, fails), done.output
        return str(done.exception)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path_factory.mktemp("daemon") / "home") as running:
        yield running


@pytest.mark.server
def test_the_status_is_told_to_people_and_to_programs(daemon: RunningDaemon) -> None:
    home = str(daemon.home.path)
    told = _run("status", "--home", home)
    assert daemon.url in told
    assert f"process {daemon.process.pid}" in told
    said = json.loads(_run("status", "--home", home, "--json"))
    assert (said["url"], said["pid"], said["jobs"]) == (daemon.url, daemon.process.pid, {})
    assert said["disk"]["used_bytes"] <= said["disk"]["most_bytes"]


@pytest.mark.server
def test_another_owner_gets_a_token_that_the_running_daemon_takes(daemon: RunningDaemon) -> None:
    token = _run("token", "ci", "--home", str(daemon.home.path)).strip()
    said = daemon.get("/isthmus/v1/status").json()
    assert said["owner"] == "first"
    for _ in range(100):  # it looks for new ones once a second
        answer = daemon.get("/isthmus/v1/status", token=token)
        if answer.status_code == 200:
            break
        time.sleep(0.05)
    assert answer.json()["owner"] == "ci"
    assert "no owner's name" in _run("token", "a b", "--home", str(daemon.home.path), fails=ConfigError)


@pytest.mark.server
def test_a_token_that_is_revoked_is_refused_once_that_is_said(daemon: RunningDaemon) -> None:
    home = ("--home", str(daemon.home.path))
    token, other = (_run("token", name, *home).strip() for name in ("leaves", "stays"))
    time.sleep(READ_EVERY)
    assert daemon.get("/isthmus/v1/status", token=token).status_code == 200
    assert "leaves is refused from now on; their jobs go on" in _run("token", "--revoke", "leaves", *home)
    assert daemon.get("/isthmus/v1/status", token=token).status_code == 401
    assert daemon.get("/isthmus/v1/status", token=other).status_code == 200
    listed = {line.split()[0]: line for line in _run("token", "--list", *home).splitlines()}
    assert listed["leaves"].endswith("revoked")
    assert not listed["stays"].endswith("revoked")
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", listed["first"])
    assert "'nobody': those that there are, are" in _run("token", "--revoke", "nobody", *home, fails=ConfigError)
    for words in ([], ["ci", "--list"], ["--list", "--revoke", "ci"]):
        assert "one of them alone" in _run("token", *words, *home, fails=ConfigError)


def test_a_token_changes_no_schema(tmp_path: Path) -> None:
    home = ("--home", str(tmp_path / "home"))
    _run("token", "ci", *home)
    database = tmp_path / "home" / "state.db"
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("update alembic_version set version_num = '0000'")
    before = database.read_bytes()
    assert "the schema of another release (0000)" in _run("token", "ci", *home, fails=StateError)
    assert database.read_bytes() == before
    assert not copy_of(database).exists()


def test_a_daemon_that_ends_just_then_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([2**22 + 1, None])  # no process has a number beyond the largest
    monkeypatch.setattr(daemon_lock, "holder", lambda _home: next(found))
    Home.make(tmp_path / "home")
    assert _run("stop", "--home", str(tmp_path / "home")) == f"stopped process {2**22 + 1}\n"


@pytest.mark.server
def test_stop_ends_it_and_logs_shows_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill = os.kill

    def kill_and_wake(pid: int, number: int) -> None:
        kill(pid, number)  # a further one like that which waits already: it gets one in all
        kill(pid, signal.SIGCONT)

    with running_daemon(tmp_path / "home") as daemon:
        home = str(daemon.home.path)
        daemon.process.send_signal(signal.SIGSTOP)
        told = _run("stop", "--home", home, "--patience", "0.2", fails=ConfigError)
        assert f"process {daemon.process.pid}) has not ended" in told
        with monkeypatch.context() as patch:
            patch.setattr(os, "kill", kill_and_wake)
            assert _run("stop", "--home", home) == f"stopped process {daemon.process.pid}\n"
        assert daemon.end(signal.SIGCONT) == "ended\n"  # what it has said before it ended
        assert holder(daemon.home) is None
        daemon.home.log.write_text("one\ntwo\n")
        assert _run("logs", "--home", home, "-n", "1") == "two\n"
        assert "no daemon runs" in _run("stop", "--home", home, fails=NotRunningError)


@pytest.mark.parametrize("words", [["status"], ["stop"], ["logs"]])
def test_where_no_daemon_was_it_is_said_and_nothing_is_made(tmp_path: Path, words: list[str]) -> None:
    told = _run(*words, "--home", str(tmp_path / "home"), fails=NotRunningError)
    assert "isthmus edge daemon start" in told
    assert not (tmp_path / "home").exists()


def test_start_reads_the_homes_settings_and_says_how_to_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run(settings: Any, home: Home, ready: Any) -> None:
        seen.update(settings=settings, home=home)
        ready(server.Started("http://127.0.0.1:1", home, sorted(settings.clouds), settings.allow_remote, "c0de"))

    monkeypatch.setattr(server, "run", run)
    home = tmp_path / "home"
    told = _run("start", "--home", str(home))
    assert "none: give --cloud FILE once, or add [clouds.NAME]" in told
    assert f"OPENAI_BASE_URL=http://127.0.0.1:1/v1 OPENAI_API_KEY=$(cat {home / 'token'})" in told
    (home / "token").write_text("tml-x\n")
    exports = told.partition("for scripts:\n")[2].partition("\npage")[0]
    assert _after(exports, {}) == {
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "OPENAI_BASE_URL": "http://127.0.0.1:1/v1",
        "OPENAI_API_KEY": "tml-x",
        "TINKER_BASE_URL": "http://127.0.0.1:1",
        "TINKER_API_KEY": "tml-x",
        "HF_ENDPOINT": "http://127.0.0.1:1/hub",
        "HF_TOKEN": f"{HUB}{hash_of('tml-x')}",  # no program sends the token itself to the hub
    }
    kept = _after(exports, {"NO_PROXY": "*.example, 10.0.0.1", "no_proxy": "b"})
    assert kept["NO_PROXY"] == "127.0.0.1,localhost,*.example, 10.0.0.1"
    assert kept["no_proxy"] == "127.0.0.1,localhost,b"
    (home / "token").unlink()
    (home / "daemon.toml").write_text('jobs_at_once = 3\n[clouds.main]\ncloud = "isthmus://a:1#SHA256:x"\n')
    told = _run("start", "--home", str(home), "--listen", "127.0.0.1:9")
    assert "main" in told
    assert "c0de" not in told  # what a service says is kept in a log
    assert (seen["settings"].jobs_at_once, seen["settings"].listen) == (3, "127.0.0.1:9")
    assert "other machines can connect" not in told
    (home / "daemon.toml").write_text('listen = "box.lan:9"\nallow_remote = true\n')
    assert "other machines can connect: prompts, data and answers cross" in _run("start", "--home", str(home))
    assert "did you mean" in _run("start", "--home", str(home), "--config", str(_written(tmp_path)), fails=ConfigError)


def test_start_with_a_cloud_is_the_one_command_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(settings: Any, home: Home, ready: Any) -> None:
        ready(server.Started("http://127.0.0.1:1", home, sorted(settings.clouds), remote=False, code="c0de"))

    monkeypatch.setattr(server, "run", run)
    monkeypatch.chdir(tmp_path)
    start = ("start", "--home", "home", "--cloud")
    assert "neither" in _run(*start, "cloud.txt", fails=ConfigError)
    assert not (tmp_path / "home").exists()
    (tmp_path / "cloud.txt").write_text("isthmus://here:1#SHA256:x")
    told = _run(*start, "cloud.txt")
    path = tmp_path / "home" / "daemon.toml"
    assert tomllib.loads(path.read_text()) == {"clouds": {"main": {"cloud": str(tmp_path / "cloud.txt")}}}
    assert f"wrote {path}\n" in told
    assert "sign in http://127.0.0.1:1/#code=c0de  (once, within 10 minutes)\n" in told
    assert "clouds  main\n" in told
    before = path.read_bytes()
    assert "wrote" not in _run(*start, "cloud.txt")  # and every day again
    told = _run(*start, "isthmus://other:1#SHA256:x", fails=ConfigError)
    assert f"{path} is there already, without --cloud isthmus://other:1#SHA256:x: add [clouds.NAME]" in told
    assert path.read_bytes() == before


def _after(exports: str, before: dict[str, str]) -> dict[str, str]:
    """What `sh` has in its environment after lines of a start message, but for what shells set themselves."""
    environment = {"PATH": os.environ["PATH"], **before}
    done = subprocess.run(
        ["sh", "-euc", f"{exports}\nenv -0"], env=environment, capture_output=True, text=True, check=True
    )
    found = dict(line.split("=", 1) for line in done.stdout.split("\0") if line)
    return {name: value for name, value in found.items() if name not in {"PATH", "PWD", "SHLVL", "_", "OLDPWD"}}


def _written(folder: Path) -> Path:
    path = folder / "other.toml"
    path.write_text("job_at_once = 3\n")
    return path


@pytest.fixture
def warm_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let `--background` start its process, and this one its own, as forks of a warm process; all end with the test."""
    started = []

    class Started(WarmPopen):
        def __init__(self, words: list[str], **options: Any) -> None:
            assert words[:5] == [sys.executable, "-m", "isthmus.cli.main", "edge", "daemon"]
            super().__init__([sys.executable, warm_daemon.__file__, *words[5:]], **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Started)
    yield
    for process in started:
        process.wait(60)


@pytest.mark.server
@pytest.mark.usefixtures("warm_start")
def test_in_the_background_an_error_of_the_start_is_told_with_its_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ("edge", "daemon", "start", "--background", "--home", tmp_path / "home", "--listen")
    done = in_process(capsys, *start, "0.0.0.0:0")
    refused(done, ConfigError.exit_code, "listen = '0.0.0.0:0'")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = in_process(capsys, *start, address)
    refused(done, PortInUseError.exit_code, address)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1


@pytest.mark.server
@pytest.mark.usefixtures("warm_start")
def test_in_the_background_it_says_which_clouds_are_not_to_be_had(tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("no connection string")
    (tmp_path / "daemon.toml").write_text(
        'listen = "127.0.0.1:0"\n[clouds.main]\ncloud = "missing.txt"\n[clouds.other]\ncloud = "other.txt"\n'
    )
    home = ("--home", str(tmp_path / "home"))
    told = _run("start", "--background", *home, "--config", str(tmp_path / "daemon.toml"), "--cloud", str(other))
    try:
        assert "models  none seen yet\naway    main: cloud = " in told
        assert "away    main: cloud = " in _run("status", *home)
        url, code = re.findall(r"sign in (\S+)/#code=(\S+)  ", told)[0]
        assert code not in _run("status", *home, "--json")
        answers = [httpx.post(f"{url}/isthmus/v1/sign-in", json={"code": code}) for _ in range(2)]
        assert answers[0].json() == {"token": (tmp_path / "home" / "token").read_text().strip()}
        assert answers[1].status_code == 403
    finally:
        _run("stop", *home)


def test_in_the_background_what_a_killed_daemon_has_left_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended:
        pid, returncode = 4321, 51

        def __init__(self, _words: list[str], **_options: Any) -> None:
            pass

        def poll(self) -> int:
            return self.returncode

    home = Home.make(tmp_path / "home")
    monkeypatch.setattr(subprocess, "Popen", Ended)
    start = ["edge", "daemon", "start", "--background", "--home", str(home.path)]
    record = json.dumps({"pid": Ended.pid, "url": "http://127.0.0.1:1", "started": 0.0})
    home.running.write_text(record)
    done = runner.invoke(app, start)
    assert (done.exit_code, done.stdout) == (Ended.returncode, "")
    home.running.write_text(record)
    with occupied(home):  # of a daemon that runs it stays
        assert runner.invoke(app, start).stdout.startswith(f"started process {Ended.pid}")
    assert home.running.read_text() == record


def test_config_prints_a_file_that_can_be_read() -> None:
    assert tomllib.loads(_run("config")) == {}
    (cloud,) = tomllib.loads(_run("config", "--cloud", "isthmus://here:1#SHA256:x"))["clouds"].values()
    assert cloud == {"cloud": "isthmus://here:1#SHA256:x"}


def test_config_is_written_once_with_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("config", "--cloud", "cloud.txt", "--write", "--home", "home")
    assert "neither" in _run(*words, fails=ConfigError)
    (tmp_path / "cloud.txt").write_text("isthmus://here:1#SHA256:x")
    _run(*words)
    path = tmp_path / "home" / "daemon.toml"
    assert tomllib.loads(path.read_text()) == {"clouds": {"main": {"cloud": str(tmp_path / "cloud.txt")}}}
    assert "is there already" in _run(*words, fails=ConfigError)


def test_the_doctors_word_is_the_exit_code(tmp_path: Path) -> None:
    done = runner.invoke(app, ["edge", "daemon", "doctor", "--home", str(tmp_path / "home"), "--json"])
    assert done.exit_code == ConfigError.exit_code
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert not found["clouds"]["ok"]
    assert found["token"]["ok"]
    told = runner.invoke(app, ["edge", "daemon", "doctor", "--home", str(tmp_path / "home")]).stdout
    assert "wrong clouds: none is known" in told


def test_where_the_daemons_libraries_are_missing_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        with daemon_commands._extra():
            raise ModuleNotFoundError(f"no {name}", name=name)

    with pytest.raises(ConfigError, match="install isthmus"):
        fail("fastapi")
    with pytest.raises(ModuleNotFoundError):
        fail("isthmus.daemon.nothing")


def test_help_loads_no_web_framework() -> None:
    code = (
        "import sys, isthmus.cli.main; "
        "print([name for name in ('fastapi', 'sqlalchemy', 'uvicorn', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
