"""What a kill leaves in the home, and no row knows: a start moves it aside, and nothing else."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.daemon.killed_between import BETWEEN, OWNER, rows
from support.daemon.running_daemon import running_daemon
from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.common.readable import size
from isthmus.daemon.disk_room import DiskRoom, taken
from isthmus.daemon.home import Home
from isthmus.daemon.set_aside import move_unknown, remove_old
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.tables import Job, Model, TinkerPromise, TinkerWeights

DAY = 86_400.0


@contextmanager
def opened(home: Home) -> Iterator[Database]:
    database = Database(home.database)
    try:
        yield database
    finally:
        database.close()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home with rows, and something in each folder that they know."""
    made = Home.make(tmp_path / "home")
    with opened(made) as database:
        rows(database)
        with database.session() as session:
            own = {"owner": OWNER, "created_at": 0.0}
            job = {"kind": "train", "model": "tiny", "spec": {}, **own}
            session.add(Job(id="ftjob-done", status="succeeded", **job))
            session.add(Job(id="ftjob-on", status="paused", **job))
            session.flush()
            model = {"base": "tiny", "job": "ftjob-done", **own}
            session.add(Model(name="done", id="ftmodel-done", folder="models/ftmodel-done", **model))
            weights = {"model": "s:train:1", "kind": "weights", "size": 0, **own}
            session.add(TinkerWeights(path="w", folder="tinker/weights/req-saved", **weights))
            promise = {"model": "s:train:1", "scope": "m", **own}
            session.add(TinkerPromise(id="req-data", key="1", kind="forward_backward", **promise))
            session.add(TinkerPromise(id="req-saves", key="2", kind="save_weights", **promise))
    for path in known(made):
        path.mkdir()
    for name in ("daemon.toml", "worker.log"):
        (made.path / name).write_text("")
    (made.path / "my-notes").mkdir()
    return made


def known(home: Home) -> list[Path]:
    return [
        home.file("file-texts"),
        home.file("file-on-0"),  # of a job that is paused, as the next ones
        home.model("ftmodel-on"),
        home.model("ftckpt-on-20"),
        home.model(".isthmus-tmp-ftckpt-on-40"),
        home.job("ftjob-on"),
        home.job("ftjob-done"),
        home.model("ftmodel-done"),
        home.tinker_model("s:train:1"),
        home.tinker_request("req-data"),
        home.tinker_weights("req-saved"),
        home.tinker_weights("req-saves"),  # it is saved again
    ]


def everything(home: Home) -> set[Path]:
    return {path.relative_to(home.path) for path in home.path.rglob("*") if "state.db" not in path.name}


@pytest.mark.parametrize("folder", BETWEEN)
def test_what_a_kill_leaves_between_disk_and_database_is_moved_aside(home: Home, folder: str) -> None:
    before = everything(home)
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "support.daemon.killed_between", str(home.path), folder]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = {path for path in everything(home) - before if path.parent == Path(folder)} - {Path("jobs/ftjob-x")}
    assert len(left) == 1
    with opened(home) as database:
        (moved,) = move_unknown(home, database)
        assert moved.relative_to(home.path) in left
        (aside,) = home.set_aside.iterdir()
        assert (aside / moved.relative_to(home.path)).exists()
        assert aside.stat().st_mode & 0o777 == 0o700
        assert before <= everything(home)
        assert move_unknown(home, database) == []


def test_what_the_database_knows_stays_and_all_else_of_the_home(home: Home) -> None:
    before = everything(home)
    with opened(home) as database:
        assert move_unknown(home, database) == []
    assert everything(home) == before
    assert not home.set_aside.exists()


def test_an_older_database_that_is_put_back_loses_nothing(home: Home) -> None:
    (home.file("file-texts") / "text").write_text("data")
    for path in home.path.glob("state.db*"):
        path.unlink()
    with opened(home) as database:
        assert set(move_unknown(home, database)) == set(known(home))
    (aside,) = home.set_aside.iterdir()
    assert (aside / "files" / "file-texts" / "text").read_text() == "data"
    assert (home.path / "my-notes").exists()


def test_a_home_that_is_a_file_system_of_its_own_has_a_folder_of_roots(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home.path / "lost+found").mkdir(mode=0o700)
    home.file("lost").write_bytes(bytes([1]) * (1 << 20))

    def scandir(path: Any) -> Any:
        if Path(path).name == "lost+found":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    listed = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "listdir", lambda path: [entry.name for entry in scandir(path)])
    with pytest.raises(PermissionError):
        list((home.path / "lost+found").iterdir())
    with opened(home) as database:
        assert len(move_unknown(home, database)) == 1
    remove_old(home, 30.0)
    assert DiskRoom(home.path, 1.0).used() > 1 << 20


def test_what_was_moved_counts_and_goes_when_it_is_old(home: Home) -> None:
    (home.file("lost")).write_bytes(bytes([1]) * (1 << 20))
    with opened(home) as database:
        move_unknown(home, database)
    room = DiskRoom(home.path, 1.0)
    assert 1 << 20 <= room.set_aside() <= room.used()
    (home.set_aside / "kept by hand").mkdir()
    (aside,) = home.set_aside.glob("2*Z")
    moved = aside.stat().st_ctime
    remove_old(home, 30.0, moved + 29.9 * DAY)
    assert aside.exists()
    remove_old(home, 30.0, moved + 30.1 * DAY)
    assert [path.name for path in home.set_aside.iterdir()] == ["kept by hand"]


@pytest.mark.server
def test_a_start_moves_it_and_says_so(home: Home) -> None:
    home.file("lost").write_bytes(bytes([1]) * (1 << 20))
    with running_daemon(home.path) as daemon:
        assert not home.file("lost").exists()
        assert all(path.exists() for path in known(home))
        assert "moved 1 files and folders that the database does not know" in home.log.read_text()
        said = daemon.get("/isthmus/v1/status").json()["disk"]
        assert said["set_aside_bytes"] == taken(home.set_aside)
        told = CliRunner().invoke(app, ["edge", "daemon", "status", "--home", str(home.path)]).stdout
        assert f"{size(said['set_aside_bytes'])} of that in set-aside" in told
