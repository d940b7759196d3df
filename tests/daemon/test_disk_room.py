"""How much a home takes, and how much more it may."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from isthmus.common.errors import DiskError
from isthmus.daemon import disk_room
from isthmus.daemon.daemon_server import make_context
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.disk_room import COUNT_EVERY, DiskRoom, taken
from isthmus.daemon.home import Home

MIB = 1 << 20


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _write(path: Path, size: int) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(bytes([1]) * size)


def test_what_a_folder_takes_is_counted_without_what_links_lead_to(tmp_path: Path) -> None:
    _write(tmp_path / "home" / "a" / "b", MIB)
    _write(tmp_path / "home" / "c", MIB)
    _write(tmp_path / "elsewhere" / "large", 8 * MIB)
    (tmp_path / "home" / "link").symlink_to(tmp_path / "elsewhere")
    assert 2 * MIB <= taken(tmp_path / "home") < 3 * MIB
    assert taken(tmp_path / "nothing") == 0


def test_more_than_the_home_may_take_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "a", 3 * MIB)
    room = DiskRoom(tmp_path, 4 / 1024)
    room.room_for(MIB // 2)
    with pytest.raises(DiskError, match=r"takes 3.* MiB of the 4.0 MiB .* 2.0 MiB more do not fit: delete"):
        room.room_for(2 * MIB)


def test_more_than_the_disk_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = DiskRoom(tmp_path, 1.0)
    room.room_for(5 * MIB)
    monkeypatch.setattr(disk_room, "_free", lambda _path: 4 * MIB)
    with pytest.raises(DiskError, match=r"4.0 MiB left"):
        room.room_for(5 * MIB)


def test_a_count_is_kept_for_a_while(tmp_path: Path) -> None:
    clock = _Clock()
    room = DiskRoom(tmp_path, 1.0, clock)
    before = room.used()
    _write(tmp_path / "a", MIB)
    assert room.used() == before
    clock.now += COUNT_EVERY
    assert room.used() >= before + MIB


def test_what_is_being_written_counts_before_it_is_there(tmp_path: Path) -> None:
    room = DiskRoom(tmp_path, 4 / 1024)
    with room.reserved(3 * MIB):
        with pytest.raises(DiskError):
            room.room_for(2 * MIB)
        with pytest.raises(DiskError), room.reserved(2 * MIB):
            pass
        _write(tmp_path / "a", 2 * MIB)
    assert room.used() >= 2 * MIB  # counted anew
    room.room_for(MIB)
    with pytest.raises(DiskError):
        room.room_for(3 * MIB)


def test_threads_do_not_reserve_the_same_room(tmp_path: Path) -> None:
    room = DiskRoom(tmp_path, 4 / 1024)
    begin, end, got = threading.Barrier(8), threading.Event(), []

    def reserve() -> None:
        begin.wait()
        try:
            with room.reserved(MIB):
                got.append(True)
                end.wait()
        except DiskError:
            got.append(False)

    threads = [threading.Thread(target=reserve) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(got) < 8:
        pass
    end.set()
    for thread in threads:
        thread.join()
    assert got.count(True) in {3, 4}  # the folder itself takes a little


def test_all_parts_of_a_daemon_know_of_the_same_room(tmp_path: Path) -> None:
    context = make_context(DaemonSettings(), Home.make(tmp_path / "home"))
    assert context.jobs._room is context.room
    assert context.jobs._runner.room is context.room
    context.database.close()
