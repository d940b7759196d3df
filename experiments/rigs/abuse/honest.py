"""Who behaves: makes one call after the other, and notes how long each took, or how long it took to get in for each."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Self

import torch

from isthmus.common.errors import IsthmusError
from isthmus.edge.client.link import connect

BATCH, SEQUENCE = 1, 32
CALM_SECONDS = 2.0
"""Before an attack, with which the calls during it are compared."""
LEAST_CALLS = 3
"""That must have ended for a median to say anything."""


class Calls:
    """Calls one after the other from a thread of its own; a context manager.

    Args:
        call: Makes one; an IsthmusError of it ends them.
        pause: Seconds between two.
    """

    def __init__(self, call: Callable[[], object], pause: float = 0.0) -> None:
        self._make, self._pause = call, pause
        self._ended_at: list[float] = []
        self._took: list[float] = []
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="honest", daemon=True)

    def latency_s(self, since: float) -> float:
        """Median seconds of the calls that ended after a moment of the monotonic clock.

        Raises IsthmusError where a call failed, or hardly any has ended.
        """
        deadline = time.monotonic() + 60.0
        while True:
            if self._error is not None:
                raise IsthmusError(f"a call of a tenant that behaves failed: {self._error}") from self._error
            took = [seconds for end, seconds in zip(self._ended_at, self._took, strict=False) if end > since]
            if len(took) >= LEAST_CALLS:
                return statistics.median(took)
            if time.monotonic() > deadline:
                raise IsthmusError(f"a tenant that behaves had {len(took)} calls answered in 60 s")
            time.sleep(0.05)

    def longest_s(self, since: float, until: float) -> float:
        """Seconds of the longest call that was under way between two moments of the monotonic clock.

        A service that stands still keeps one call waiting, as each comes after the one before: no median shows it.

        Raises IsthmusError where a call failed.
        """
        while not (self._ended_at and self._ended_at[-1] > until):  # each call has a limit of its own
            if self._error is not None:
                raise IsthmusError(f"a call of an owner who behaves failed: {self._error}") from self._error
            time.sleep(0.05)
        calls = zip(self._ended_at, self._took, strict=False)
        return max(took for end, took in calls if end > since and end - took < until)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                begun = time.monotonic()
                self._make()
                self._took.append(time.monotonic() - begun)
                self._ended_at.append(time.monotonic())
                self._stop.wait(self._pause)
        except IsthmusError as error:
            self._error = error


class Honest(Calls):
    """Forward calls without a pause.

    Args:
        connection: Of the cloud.
        key: Its own.
        anew: Whether it opens a session for each call, and that is what it takes time of.
    """

    def __init__(self, connection: str, key: Path, *, anew: bool = False) -> None:
        super().__init__(self._forward)
        self._connect, self._anew = partial(connect, connection, key=key), anew
        self._link = self._connect()
        self._hidden = torch.zeros(BATCH, SEQUENCE, self._link.info.hidden_size)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._link.close()

    def _forward(self) -> None:
        if self._anew:
            self._link.close()
            self._link = self._connect()
        self._link.forward_span(self._hidden, None, None, keep=False)
