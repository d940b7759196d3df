"""The recorder: whose files it makes, what it writes, and where it ends."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.protocol.wire import TENANT, forward, session_info

from isthmus.privacy.recording.recorder import Recorder
from isthmus.privacy.recording.recording_file import Kind, entry_of, read_entries
from isthmus.protocol import messages as m

SESSION = b"s" * 16
INFO = session_info(TENANT, SESSION)
ATTACH = m.Attach(b"l" * 16, account=m.Account("alice", 1))
ROOM = 1 << 20
STATUS = m.Status(m.StatusCode.OK, None, "")


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """What the log says of recordings that ended."""
    monkeypatch.setattr(logging.getLogger("isthmus"), "propagate", True)
    caplog.set_level(logging.INFO, "isthmus")
    return lambda: [record.__dict__["fields"] for record in caplog.records if record.message == "recording_ended"]


def opened(folder: Path, max_bytes: int = ROOM) -> Recorder:
    recorder = Recorder(folder, max_bytes)
    recorder.opened(INFO, ATTACH)
    return recorder


def kinds(path: Path) -> list[str]:
    return [type(entry.content).__name__ for entry in read_entries(path)]


def test_what_is_computed_is_written_and_files_are_not(tmp_path: Path) -> None:
    recorder = opened(tmp_path)
    fetch, call = m.Fetch(m.FileSet.PARTS, "config.json", 0), forward((1, 2, 8))
    for message, answer in ((fetch, STATUS), (call, STATUS), (m.Ping(1), m.Pong(1, 0))):
        recorder.received(SESSION, message)
        recorder.sent(SESSION, message, answer)
    recorder.close()
    assert kinds(tmp_path / "recording.bin") == ["Opened", "Forward", "Status"]
    recorder.received(SESSION, call)
    assert len(kinds(tmp_path / "recording.bin")) == 3


def test_files_are_their_users_alone_and_each_process_has_its_own(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        first, second = opened(tmp_path), opened(tmp_path)
    finally:
        os.umask(old)
    for recorder in (first, second):
        recorder.received(SESSION, forward((1, 2, 8)))
        recorder.close()
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["recording-1.bin", "recording.bin"]
    assert [path.stat().st_mode & 0o777 for path in files] == [0o600] * 2
    assert [kinds(path) for path in files] == [["Opened", "Forward"]] * 2


def test_nothing_is_written_before_a_session_is_opened(tmp_path: Path) -> None:
    Recorder(tmp_path, ROOM).close()
    assert not list(tmp_path.iterdir())


def test_a_recording_ends_at_its_bound_and_says_so_once(
    tmp_path: Path, told: Callable[[], list[dict[str, Any]]]
) -> None:
    opened(tmp_path).close()
    call = forward((1, 2, 8))
    before, each = (tmp_path / "recording.bin").stat().st_size, sum(map(len, entry_of(Kind.FROM_EDGE, SESSION, call)))
    bound = 2 * before + 3 * each  # what the first process has written counts as well
    recorder = opened(tmp_path, bound)
    for _ in range(3):
        recorder.received(SESSION, call)
    assert told() == []
    recorder.received(SESSION, call)
    recorder.received(SESSION, forward((1, 1, 1)))  # a smaller one has no place behind what is missing
    recorder.sent(SESSION, call, STATUS)
    (said,) = told()
    reason = f"it would take more than {bound} bytes"
    assert said == {"folder": str(tmp_path), "bytes": bound - before, "reason": reason}
    assert kinds(tmp_path / "recording-1.bin") == ["Opened", *["Forward"] * 3]


def test_a_full_disk_ends_a_recording_whose_file_stays_whole(
    tmp_path: Path, told: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, call, write, written = opened(tmp_path), forward((1, 2, 8)), os.write, []
    recorder.received(SESSION, call)

    def fill(descriptor: int, data: memoryview) -> int:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(write(descriptor, data[:7]))  # a part of it
        return written[-1]

    monkeypatch.setattr(os, "write", fill)
    recorder.received(SESSION, call)
    recorder.received(SESSION, call)
    assert written == [7, 7]
    assert [said["reason"] for said in told()] == ["No space left on device"]
    assert kinds(tmp_path / "recording.bin") == ["Opened", "Forward"]


def test_a_folder_that_is_gone_ends_a_recording_and_nothing_else(
    tmp_path: Path, told: Callable[[], list[dict[str, Any]]]
) -> None:
    recorder = opened(tmp_path / "gone")
    recorder.received(SESSION, forward((1, 2, 8)))
    assert [said["reason"] for said in told()] == ["No such file or directory"]
