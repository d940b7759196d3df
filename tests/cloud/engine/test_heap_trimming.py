"""When free memory goes back to the system."""

from __future__ import annotations

import mmap
import threading

import pytest

from isthmus.cloud.engine import engine as engine_module
from isthmus.cloud.engine.engine import TRIM_SECONDS, HeapTrimmer, resident_bytes


@pytest.mark.parametrize(("sessions", "size", "trims"), [(2, 151, True), (2, 150, False), (1, 1000, False)])
def test_the_heap_is_trimmed_where_several_sessions_make_the_process_large(
    monkeypatch: pytest.MonkeyPatch, sessions: int, size: int, trims: bool
) -> None:
    trimmed, now = threading.Event(), [100]
    monkeypatch.setattr(engine_module, "resident_bytes", lambda: now[0])
    monkeypatch.setattr(engine_module, "trim_heap", trimmed.set)
    trimmer = HeapTrimmer(lambda: sessions, 50)
    now[0] = size
    trimmer.worked()
    assert trimmed.wait(10 if trims else 5 * TRIM_SECONDS) is trims
    trimmer.shutdown()


def test_the_heap_is_trimmed_once_more_when_nothing_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed = threading.Event()
    monkeypatch.setattr(engine_module, "trim_heap", trimmed.set)
    trimmer = HeapTrimmer(lambda: 0, 1e12)
    assert not trimmed.wait(2 * TRIM_SECONDS), "nothing was computed"
    trimmer.worked()
    assert trimmed.wait(10)
    trimmer.shutdown()


def test_what_this_process_has_in_memory() -> None:
    with mmap.mmap(-1, 8 << 20) as block:
        before = resident_bytes()
        block.write(bytes(8 << 20))
        assert resident_bytes() - before >= 6 << 20
