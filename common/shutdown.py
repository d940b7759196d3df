"""How commands stop and how their process ends.

interruptible   a command: Ctrl-C or SIGTERM ends it with one line and exit code 130
uninterrupted   a block that must finish first: the signal is handled after it
StopRequest     a loop: it finishes its micro-batch, and a second signal stops it at once
run_to_end      a process: it ends without taking its objects apart
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""

stop_asked = threading.Event()
"""Set once a `StopRequest` was asked to stop, or whoever else handles signals has set it: it outranks what follows."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible(otherwise: str = "stopped") -> Iterator[None]:
    """End the command with exit code 130 on Ctrl-C, after printing the interrupt's own message, or else `otherwise`.

    SIGTERM, which `kill` and service managers send, is treated as Ctrl-C unless it has a handler already, so that what
    the command has started, such as other processes, is ended with it.
    """
    before = signal.getsignal(signal.SIGTERM) if _in_main_thread() else None
    if before is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _raise_interrupt)
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
    """Hold Ctrl-C and SIGTERM back until the block has ended, for instance while it starts a process.

    Does nothing outside the main thread, which alone receives signals.
    """
    if not _in_main_thread():
        yield
        return
    late: list[int] = []
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
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


class Interrupted(Exception):  # noqa: N818  # not an error but a request; it never leaves the loop that asked for it
    """The user asked to stop; the work under way is given up."""


class StopRequest:
    """Remembers the first signal, and turns the second one into `KeyboardInterrupt`.

    Args:
        first: What the user is shown at the first signal.
        second: What the interrupt says.
        signals: Which signals it listens to.
    """

    def __init__(
        self,
        first: str = "Stopping after this micro-batch; once more to stop at once.",
        second: str = "Stopped at once; the newest checkpoint is untouched.",
        signals: Sequence[signal.Signals] = _SIGNALS,
    ) -> None:
        self._requested = False
        self._first, self._second, self._signals = first, second, tuple(signals)

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._requested

    def check(self) -> None:
        """Called where the loop may stop.

        Raises:
            Interrupted: A signal has come.
        """
        if self._requested:
            raise Interrupted

    @contextmanager
    def listen(self, say: Callable[[str], None]) -> Iterator[None]:
        """Handle the signals while the block runs; `say` shows the user a line.

        A request is forgotten when the block ends. Does nothing outside the main thread, which alone receives signals.
        """
        if not _in_main_thread():
            yield
            return

        def request(_number: int, _frame: Any) -> None:
            if self._requested:
                raise KeyboardInterrupt(self._second)
            self._requested = True
            stop_asked.set()
            say(self._first)

        before = {number: signal.signal(number, request) for number in self._signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._requested = False


def run_to_end(main: Callable[[], None]) -> None:
    """Run a process's `main` and end the process without taking its objects apart.

    A command that has trained leaves close to a million objects. Python would search all of them for cycles before it
    ends, which takes longer than many a command, and the kernel frees the memory anyway.

    The process ends with the code of `SystemExit`, or 0, after its non-daemon threads have ended, its `atexit` handlers
    have run and its output is written. Any other exception propagates as usual.
    """
    code = 0

    def leave() -> None:
        try:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
        except (OSError, ValueError):
            return  # Python reports the stream's error, and ends with a code of its own
        os._exit(code)

    atexit.register(leave)  # the first to be registered is the last to be called
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except BaseException:
        atexit.unregister(leave)
        raise


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _raise_interrupt(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt
