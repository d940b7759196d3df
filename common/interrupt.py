"""How a command that is told to stop ends."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""


@contextmanager
def interruptible(otherwise: str = "stopped") -> Iterator[None]:
    """Let Ctrl-C end the command with what the work says about going on, or with `otherwise`.

    SIGTERM, which `kill` and service managers send, becomes the same, unless there is a handler for it: what the work
    has started, other processes say, is ended with it.
    """
    outermost = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if outermost else None
    if before is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        yield
    except KeyboardInterrupt as stop:
        print(f"isthmus: {str(stop) or otherwise}", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None
    finally:
        if before is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Have Ctrl-C and SIGTERM wait for the end of the block, which would lose what it has made: a process, say.

    Does nothing outside the main thread, which alone is interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    late: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in ours:
        signal.signal(number, lambda number, _frame: late.append(number))
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        if late:
            signal.raise_signal(late[0])


def _as_interrupt(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt
