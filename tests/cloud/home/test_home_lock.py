"""One `serve` for each home, and the folder of its Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support.cloud.clouds import Home
from support.models.tiny import tiny_checkpoint

from isthmus.cloud.control import supervisor as serve_module
from isthmus.cloud.control.serve_options import ServeOptions
from isthmus.cloud.control.serve_state import STATE_FILE, read_status, write_state
from isthmus.cloud.home import home_lock as lock_module
from isthmus.cloud.home.home_lock import LOCK_FILE, SOCKET_PATH_BYTES, occupied, socket_folder
from isthmus.common.errors import ConfigError, DiskError, HomeInUseError, UnreachableError

HOLD = """
import sys, time
from pathlib import Path
from isthmus.cloud.home.home_lock import occupied
with occupied(Path(sys.argv[1])) as lock:
    print(lock.make_ray_folder(), flush=True)
    time.sleep(600)
"""


def holder(home: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that holds a home, and the folder that it has made for Ray."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(home)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_second_serve_is_refused_and_takes_nothing_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_module, "Serving", lambda *_, **__: pytest.fail("Ray was started"))
    home, model = Home(tmp_path).folder, tiny_checkpoint("llama", tmp_path / "model")
    write_state(home, {"connection": "isthmus://h:7443", "metrics": "", "pid": 1})
    (home / "pipeline").mkdir()
    (home / "pipeline" / "key").write_text("the first one's")
    with occupied(home), pytest.raises(HomeInUseError, match=f"process {os.getpid()} serves with the home") as refusal:
        serve_module.serve(ServeOptions(str(model), home, listen="127.0.0.1:0", pipeline=2))
    assert refusal.value.exit_code == 61
    assert (home / STATE_FILE).exists()
    assert (home / "pipeline" / "key").read_text() == "the first one's"


def test_a_home_is_free_again_when_its_holder_is_killed_and_what_that_left_is_removed(tmp_path: Path) -> None:
    process, left = holder(tmp_path)
    try:
        with pytest.raises(HomeInUseError, match=f"process {process.pid} "), occupied(tmp_path):
            pytest.fail("it was held twice")
        assert left.parent.stat().st_mode & 0o777 == 0o700
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert left.parent.exists()
        with occupied(tmp_path) as lock:
            assert not left.parent.exists()
            own = lock.make_ray_folder()
            own.mkdir()
            (own / "raylet").touch()
            own.chmod(0o777)  # as Ray does
            assert own.parent.stat().st_mode & 0o777 == 0o700
        assert not own.parent.exists()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]  # a pipe


@pytest.mark.parametrize("said", ["", "{", "[1]", '{"pid": 7}', '{"ray_folder": 7}'])
def test_a_lock_of_which_nothing_can_be_read_is_a_lock(tmp_path: Path, said: str) -> None:
    (tmp_path / LOCK_FILE).write_text(said)
    with occupied(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text()) == {"pid": os.getpid(), "ray_folder": None}


def test_nothing_is_removed_that_this_has_not_made(tmp_path: Path) -> None:
    kept = tmp_path / "documents"
    kept.mkdir()
    link = tmp_path / "isthmus-link"
    link.symlink_to(kept)
    for path in (kept, link):
        (kept / "file").write_text("kept")
        (tmp_path / LOCK_FILE).write_text(json.dumps({"pid": 1, "ray_folder": str(path)}))
        with occupied(tmp_path):
            assert (kept / "file").exists()


def test_the_sockets_path_is_short_enough_wherever_temporary_files_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    inside = len(lock_module._LONGEST_SOCKET)
    folder = socket_folder(inside)
    assert folder.parent == Path("/tmp")  # noqa: S108  # compared only
    assert len(str(folder)) + 1 + inside <= SOCKET_PATH_BYTES
    assert not list(long.iterdir())
    folder.rmdir()
    with pytest.raises(ConfigError, match=r"at most 107 bytes.*would have paths of .*set TMPDIR"):
        socket_folder(100)


def test_a_folder_that_everybody_may_rename_is_none_for_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert socket_folder(10).parent == tmp_path
    tmp_path.chmod(0o777)
    folder = socket_folder(10)
    assert folder.parent != tmp_path
    folder.rmdir()
    tmp_path.chmod(0o1777)
    assert socket_folder(10).parent == tmp_path
    tmp_path.chmod(0o700)


def test_a_home_without_a_state_says_so_and_one_that_cannot_be_locked_too(tmp_path: Path) -> None:
    with occupied(tmp_path), pytest.raises(UnreachableError, match="no cloud serves"):
        read_status(tmp_path)
    (tmp_path / LOCK_FILE).unlink()
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DiskError, match=LOCK_FILE), occupied(tmp_path):
        pytest.fail("it was held")
