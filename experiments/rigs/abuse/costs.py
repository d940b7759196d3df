"""What one call, one departure or one download of a tenant costs the others: done by hand against a running cloud.

What generation costs them is in `isthmus.experiments.rigs.abuse.decode_costs`.

long_call     one sequence of 16,384 positions, which a model with a limit takes for S² pairs of positions
large_call    as many sequences as the cloud takes in one call
disconnect    forwards that are kept, which may share a pass with others', and then the stream is cut
download      the edge's parts, over and over
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from isthmus.common.errors import IsthmusError
from isthmus.experiments.rigs.abuse.decode_costs import ANSWER_SECONDS, DECODE_COSTS
from isthmus.experiments.rigs.hostile_tenants import Session, during
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import ConnectionString

LONG, SEQUENCE = 16384, 128
"""Positions of the long call, 2 MiB of a model with 32 numbers a position; and of the large call's sequences."""


def long_call(session: Session, seconds: float) -> m.Message:
    """One sequence of `LONG` positions."""
    return session.ask(session.forward(1, 1, LONG))


def large_call(session: Session, seconds: float) -> m.Message:
    """As many positions as the cloud takes, in sequences of ordinary length: half of what it refuses, and so on."""
    rows, number = max(1, session.info.limits.max_tokens_per_call // SEQUENCE), 1
    answer = session.ask(session.forward(number, rows, SEQUENCE), ANSWER_SECONDS)
    while isinstance(answer, m.Status) and rows > 1:
        rows, number = rows // 2, number + 1
        answer = session.ask(session.forward(number, rows, SEQUENCE), ANSWER_SECONDS)
    return answer


def disconnect(session: Session, seconds: float) -> None:
    """Kept forwards for a while, and then the stream is cut without a goodbye."""
    for number in during(seconds):
        session.ask(session.forward(number, 2, 64))
    session.stream.close()


def download(session: Session, seconds: float) -> None:
    """The largest file of the edge's parts, from its beginning to its end and again."""
    listing = session.ask(m.FetchList(m.FileSet.PARTS))
    if not isinstance(listing, m.FileList):
        raise IsthmusError(f"the cloud answered with {type(listing).__name__} instead of its files")
    largest = max(listing.entries, key=lambda entry: entry.size)
    end, fetched = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        chunk = session.ask(m.Fetch(m.FileSet.PARTS, largest.name, fetched % largest.size))
        if not isinstance(chunk, m.Blob):
            raise IsthmusError(f"the cloud answered with {type(chunk).__name__} instead of a chunk of {largest.name}")
        fetched += len(chunk.data)


COSTS: dict[str, Callable[[Session, float], m.Message | None]] = {
    "long_call": long_call,
    "large_call": large_call,
    "disconnect": disconnect,
    "download": download,
    **DECODE_COSTS,
}
COMPUTED: Final = ("large_call", "disconnect", *DECODE_COSTS)
"""What makes the cloud compute; a long call is refused."""


@contextlib.contextmanager
def opened(cloud: str, key: Path) -> Iterator[Session]:
    """A session that is cut at the end, without a goodbye."""
    session = Session(ConnectionString.parse(cloud), key)
    try:
        yield session
    finally:
        session.stream.close()
