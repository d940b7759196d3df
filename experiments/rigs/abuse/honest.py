"""A tenant that behaves: it makes one forward call after the other, and notes how long each took, or how long it took
to get in for each."""

from __future__ import annotations

import statistics
import threading
import time
from functools import partial
from pathlib import Path

import torch

from isthmus.common.errors import IsthmusError
from isthmus.edge.client.link import connect

BATCH, SEQUENCE = 1, 32
LEAST_CALLS = 3
"""That must have ended for a median to say anything."""


class Honest:
    """Calls without a pause from a thread of its own; a context manager.

    Args:
        connection: Of the cloud.
        key: Its own.
        anew: Whether it opens a session for each call, and that is what it takes time of.
    """

    def __init__(self, connection: str, key: Path, *, anew: bool = False) -> None:
        self._connect, self._anew = partial(connect, connection, key=key), anew
        self._link = self._connect()
        self._ended_at: list[float] = []
        self._took: list[float] = []
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._call, name="honest", daemon=True)

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

    def __enter__(self) -> Honest:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._link.close()

    def _call(self) -> None:
        hidden = torch.zeros(BATCH, SEQUENCE, self._link.info.hidden_size)
        try:
            while not self._stop.is_set():
                begun = time.monotonic()
                if self._anew:
                    self._link.close()
                    self._link = self._connect()
                self._link.forward_span(hidden, None, None, keep=False)
                self._took.append(time.monotonic() - begun)
                self._ended_at.append(time.monotonic())
        except IsthmusError as error:
            self._error = error
