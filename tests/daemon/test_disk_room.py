"""How much a home takes, and how much more it may."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest

from isthmus.daemon import disk_room
from isthmus.daemon.daemon_server import make_context
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.disk_room import COUNT_EVERY, DiskRoom, NoRoomError, taken
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
    (tmp_path / "home" / "a" / "c").hardlink_to(tmp_path / "home" / "c")
    _write(tmp_path / "elsewhere" / "large", 8 * MIB)
    (tmp_path / "home" / "link").symlink_to(tmp_path / "elsewhere")
    assert 2 * MIB <= taken(tmp_path / "home") < 3 * MIB
    assert taken(tmp_path / "nothing") == 0


def test_more_than_the_home_may_take_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "a", 3 * MIB)
    room = DiskRoom(tmp_path, 4 / 1024)
    room.room_for(MIB // 2)
    with pytest.raises(
        NoRoomError, match=r"^the daemon's disk is full: delete files, models or jobs of yours$"
    ) as full:
        room.room_for(2 * MIB)
    assert re.search(r"takes 3.* MiB of the 4.0 MiB .* 2.0 MiB more do not fit: delete", full.value.figures)


def test_more_than_the_disk_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = DiskRoom(tmp_path, 1.0)
    room.room_for(5 * MIB)
    monkeypatch.setattr(disk_room, "_free", lambda _path: 4 * MIB)
    with pytest.raises(NoRoomError) as full:
        room.room_for(5 * MIB)
    assert "4.0 MiB left" in full.value.figures


def test_a_count_is_kept_for_a_while(tmp_path: Path) -> None:
    clock = _Clock()
    room = DiskRoom(tmp_path, 1.0, clock)
    before = room.used()
    _write(tmp_path / "a", MIB)
    assert room.used() == before
    clock.now += COUNT_EVERY
    assert room.used() >= before + MIB


def test_a_file_that_comes_in_pieces_counts_once_and_as_far_as_it_has_come(tmp_path: Path) -> None:
    clock = _Clock()
    room = DiskRoom(tmp_path, 4 / 1024, clock)
    with room.growing() as take:
        room.room_for(3 * MIB)  # nothing is kept for pieces that are still to come
        take(2 * MIB)
        with pytest.raises(NoRoomError):
            room.room_for(3 * MIB)
        _write(tmp_path / "a", 2 * MIB)
        clock.now += COUNT_EVERY
        assert 2 * MIB <= room.used() < 3 * MIB
        with pytest.raises(NoRoomError):
            take(3 * MIB)
        take(MIB)
        room.room_for(0)  # as jobs ask that run: what was refused to others does not count
        (tmp_path / "a").unlink()
    assert room.used() < MIB  # counted anew


def test_threads_do_not_take_the_same_room(tmp_path: Path) -> None:
    room = DiskRoom(tmp_path, 4 / 1024)
    begin, end, got = threading.Barrier(8), threading.Event(), []

    def write() -> None:
        with room.growing() as take:
            begin.wait()
            try:
                take(MIB)
                got.append(True)
            except NoRoomError:
                got.append(False)
            end.wait()

    threads = [threading.Thread(target=write) for _ in range(8)]
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
