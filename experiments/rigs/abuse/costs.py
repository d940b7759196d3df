"""What one call, one departure or one download of a tenant costs the others: done by hand against a running cloud.

long_call     one sequence of 16,384 positions, which a model with a limit takes for S² pairs of positions
large_call    as many sequences as the cloud takes in one call
disconnect    forwards that are kept, which may share a pass with others', and then the stream is cut
download      the edge's parts, over and over
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from isthmus.common.errors import IsthmusError
from isthmus.experiments.rigs.hostile_tenants import Session
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import ConnectionString
from isthmus.protocol.tensor_codecs import Role, codec_id, encode

LONG = 16384
"""Positions of the long call: 2 MiB of a model with 32 numbers a position."""


def forward(session: Session, number: int, batch: int, sequence: int, *, keep: bool) -> m.Forward:
    """A call of zeros."""
    payload = encode(torch.zeros(batch, sequence, session.hidden_size), "fp32", Role.ACTIVATION)
    return m.Forward(m.CallId(1, number), keep, payload, None, None, codec_id("fp32"))


def ask(session: Session, message: m.Message) -> dict[str, Any]:
    """Send a message; what came, and after how many seconds."""
    start = time.perf_counter()
    session.send(message)
    answer = session.receive()
    came = {"answer": type(answer).__name__, "seconds": round(time.perf_counter() - start, 3)}
    return {**came, "says": answer.message} if isinstance(answer, m.Status) else came


def long_call(session: Session, seconds: float) -> dict[str, Any]:
    """One sequence of `LONG` positions."""
    return ask(session, forward(session, 1, 1, LONG, keep=True))


def large_call(session: Session, seconds: float, sequence: int = 128) -> dict[str, Any]:
    """As many positions as the cloud takes, in sequences of ordinary length: half of what it refuses, and so on."""
    rows, number = max(1, session.max_tokens // sequence), 1
    came = ask(session, forward(session, number, rows, sequence, keep=True))
    while came["answer"] == "Status" and rows > 1:
        rows, number = rows // 2, number + 1
        came = ask(session, forward(session, number, rows, sequence, keep=True))
    return came | {"positions": rows * sequence}


def disconnect(session: Session, seconds: float) -> dict[str, Any]:
    """Kept forwards for a while, and then the stream is cut without a goodbye."""
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        number += 1
        session.send(forward(session, number, 2, 64, keep=True))
        session.receive()
    session.stream.close()
    return {"kept": number}


def download(session: Session, seconds: float) -> dict[str, Any]:
    """The largest file of the edge's parts, from its beginning to its end and again."""
    session.send(m.FetchList(m.FileSet.PARTS))
    listing = session.receive()
    if not isinstance(listing, m.FileList):
        raise IsthmusError(f"the cloud answered with {type(listing).__name__} instead of its files")
    largest = max(listing.entries, key=lambda entry: entry.size)
    end, fetched = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        session.send(m.Fetch(m.FileSet.PARTS, largest.name, fetched % largest.size))
        chunk = session.receive()
        if not isinstance(chunk, m.Blob):
            raise IsthmusError(f"the cloud answered with {type(chunk).__name__} instead of a chunk of {largest.name}")
        fetched += len(chunk.data)
    return {"bytes": fetched}


COSTS: dict[str, Callable[[Session, float], dict[str, Any]]] = {
    "long_call": long_call,
    "large_call": large_call,
    "disconnect": disconnect,
    "download": download,
}


def run(deed: str, cloud: str, key: Path, seconds: float = 5.0) -> dict[str, Any]:
    """Do a deed; returns what came of it.

    Args:
        deed: a name of `COSTS`.
        cloud: the connection string.
        key: the file with an enrolled edge's key.
        seconds: how long, for what goes on.
    """
    session = Session(ConnectionString.parse(cloud), key)
    try:
        return COSTS[deed](session, seconds)
    finally:
        session.stream.close()
