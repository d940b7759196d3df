"""Ctrl-C and SIGTERM as a request that a loop answers where it may stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):  # noqa: N818  # not an error but a request; it never leaves the loop that asked for it
    """The user asked to stop; the work under way is given up."""


class StopRequest:
    """Remembers the first signal, and lets the second one through."""

    def __init__(self) -> None:
        self._asked = False

    def check(self) -> None:
        """Called where the loop may stop.

        Raises:
            Interrupted: A signal has come.
        """
        if self._asked:
            raise Interrupted

    @contextmanager
    def listen(self, say: Callable[[str], None]) -> Iterator[None]:
        """Listen while the block runs; `say` tells the user.

        A request counts within the block only. Outside the main thread, where Python allows no handlers, this does
        nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self._asked:
                raise KeyboardInterrupt("Stopped at once; the newest checkpoint is untouched.")
            self._asked = True
            say("Stopping after this micro-batch; once more to stop at once.")

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._asked = False
