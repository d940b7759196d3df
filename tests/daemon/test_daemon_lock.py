"""One daemon for each home."""

from __future__ import annotations

import fcntl
import os
import subprocess
import threading
from pathlib import Path

import pytest

from isthmus.common.errors import DiskError, HomeInUseError
from isthmus.common.files import open_lock
from isthmus.daemon.daemon_lock import holder, occupied
from isthmus.daemon.home import Home


def test_a_home_is_held_by_one_and_free_afterwards(tmp_path: Path) -> None:
    home = Home.make(tmp_path / "home")
    assert holder(home) is None
    with occupied(home):
        assert holder(home) == os.getpid()
        with pytest.raises(HomeInUseError, match=str(os.getpid())), occupied(home):
            pass
        assert holder(home) == os.getpid()
    assert holder(home) is None
    with occupied(home):
        pass


def test_somebody_who_only_looks_is_waited_for(tmp_path: Path) -> None:
    home = Home.make(tmp_path / "home")
    with open_lock(home.lock) as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.1, fcntl.flock, [looking.fileno(), fcntl.LOCK_UN]).start()
        with occupied(home):
            pass


def test_what_a_killed_daemon_has_left_is_not_taken_for_the_holder(tmp_path: Path) -> None:
    home = Home.make(tmp_path / "home")
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other, occupied(home):  # it ends with its input
        home.lock.write_text(str(other.pid))  # as before the new holder has written its own
        assert holder(home) is None
        home.lock.write_text(str(os.getpid()))
        assert holder(home) == os.getpid()
    assert home.lock.read_text() == ""


def test_a_link_in_the_locks_place_is_not_followed(tmp_path: Path) -> None:
    home = Home.make(tmp_path / "home")
    (tmp_path / "other").write_text("precious")
    home.lock.symlink_to(tmp_path / "other")
    with pytest.raises(DiskError, match="cannot be written"), occupied(home):
        pass
    assert (tmp_path / "other").read_text() == "precious"
