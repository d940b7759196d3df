"""Sessions that prefill and then stall or vanish: the pool stays within its budget, and others generate as ever."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.clouds import Home, ThreadServer
from support.cloud.sessions import Channel, channel, channels, eventually
from support.models.tiny import HIDDEN

from isthmus.backbone.decoding.decode_pass import DecodePass
from isthmus.backbone.decoding.key_values import cache_bytes
from isthmus.cloud.bounds import Bounds, EngineOptions
from isthmus.cloud.decoding.cache_pool import CachePool
from isthmus.cloud.session.served_model import Served
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Quota
from isthmus.protocol.limits import TransferTimeout
from isthmus.protocol.tensor_codecs import Role, codec_id, decode, encode

SESSIONS = 50
LENGTH = 40
ROOM = 7
"""Caches of so many positions that the pool has room for."""
STALLED, AGE = 1.0, 3600.0


def states(seed: int, length: int = LENGTH, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


def call(number: int, start: int, hidden: torch.Tensor, *, cache: int = 0) -> m.Decode:
    sent = encode(hidden, "fp32", Role.ACTIVATION)
    return m.Decode(m.CallId(1, number), cache, start, (), (), sent, None, None, codec_id("fp32"))


class Place:
    """A server with a small pool, whose clock moves by hand."""

    def __init__(self, cloud: Served, folder: Path) -> None:
        self.now = 0.0
        self.span = cloud.executor.host.span
        self.small = dataclasses.replace(cloud, cache_bytes=ROOM * cache_bytes(self.span, 1, LENGTH))
        quota = Quota(max_sessions=SESSIONS + 1)
        bounds = Bounds(
            transfer=TransferTimeout(STALLED, least_rate=1 << 30), max_session_age=AGE,
            engine=EngineOptions(prefill_tokens=16),
        )  # fmt: skip
        home = Home(folder, quota=quota)
        self.server = ThreadServer(self.small, home, bounds=bounds, clock=lambda: self.now)
        self.other = home.new_edge("bob", quota=Quota(max_sessions=SESSIONS + 1))

    @property
    def pool(self) -> CachePool:
        pool: CachePool = self.server.server._calls.caches
        return pool

    def check(self) -> None:
        """The pool is within its budget, by its own account, by the status, and by what the buffers have."""
        status = self.server.server.status()
        held = sum(entry.keys.nbytes for entry in list(self.pool._entries.values()))
        assert max(held, self.pool.used, status["cache_bytes"]) <= self.small.cache_bytes
        assert status["cache_budget_bytes"] == self.small.cache_bytes

    def text_is_right(self, session: Channel) -> None:
        """Generate in a further session: a prompt, and tokens after it, as the span computes them in one piece."""
        given = states(99, LENGTH + 4)
        expected = self.span(given)
        outputs = []
        for number, (start, stop) in enumerate(((0, LENGTH), *((LENGTH + at, LENGTH + at + 1) for at in range(4)))):
            reply = session.ask(call(1 + number, start, given[:, start:stop]), 20)
            assert isinstance(reply, m.ForwardReply)
            outputs.append(decode(reply.hidden))
            self.check()
        assert torch.allclose(torch.cat(outputs, dim=1), expected, atol=1e-4)


@pytest.fixture
def place(cloud: Served, tmp_path: Path) -> Iterator[Place]:
    made = Place(cloud, tmp_path)
    with made.server:
        yield made


def stall(session: Channel) -> None:
    """Send the first frame of a call, and nothing behind it."""
    frames = session._session.send(call(2, LENGTH, states(3, 10_000)))  # more than one frame takes
    session._stream.send(next(frames))
    assert next(frames)


def test_fifty_sessions_that_prefill_and_vanish_leave_the_pool_within_its_bound(place: Place) -> None:
    opened: list[Channel] = []

    def left() -> int:
        return sum(place.server.server.status()["sessions"].values())

    for number in range(SESSIONS):
        opened.append(channel(place.server, bytes((number,)) * 16, place.other if number % 2 else None))
        reply = opened[-1].ask(call(1, 0, states(number)), 20)
        assert isinstance(reply, m.ForwardReply)
        place.check()
    status = place.server.server.status()
    assert (status["caches"], status["caches_evicted"]) == (ROOM, SESSIONS - ROOM)
    vanishing, stalling, silent = (opened[first::3] for first in range(3))
    with contextlib.closing(channel(place.server, b"f" * 16)) as further:
        place.text_is_right(further)
        for session in stalling:
            stall(session)
        for session in vanishing:
            session.abandon()  # without a goodbye
        eventually(lambda: left() == 1 + len(silent))
        place.check()
        assert len(place.pool) <= 1 + len(silent)
        place.text_is_right(further)
    place.now = AGE + 1  # of a session that says nothing any more
    eventually(lambda: left() == 0)
    eventually(lambda: len(place.pool) == 0)
    status = place.server.server.status()
    assert (status["caches"], status["cache_bytes"]) == (0, 0)
    for session in (*stalling, *silent):
        session.abandon()


def test_a_pool_without_eviction_would_be_beyond_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    acquire = CachePool._acquire

    def greedy(self: CachePool, key: Any, entry: Any, nbytes: int) -> bool:
        self.budget *= 2  # a budget that gives way instead
        try:
            return acquire(self, key, entry, nbytes)
        finally:
            self.budget //= 2

    monkeypatch.setattr(CachePool, "_acquire", greedy)
    with channels(place.server, ROOM + 1) as opened:
        for number, session in enumerate(opened):
            assert isinstance(session.ask(call(1, 0, states(number)), 20), m.ForwardReply)
        with pytest.raises(AssertionError):
            place.check()


def test_a_step_that_runs_when_its_session_vanishes_counts_until_it_is_over(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, over, run = threading.Event(), threading.Event(), DecodePass.__call__

    def held(self: DecodePass, calls: Any) -> Any:
        begun.set()
        over.wait(20)
        return run(self, calls)

    monkeypatch.setattr(DecodePass, "__call__", held)
    session = channel(place.server)
    for frame in session._session.send(call(1, 0, states(1))):
        session._stream.send(frame)
    assert begun.wait(10)
    session.abandon()
    eventually(lambda: place.server.server.status()["sessions"] == {})
    assert place.pool.used == cache_bytes(place.span, 1, LENGTH)  # the step still fills it
    over.set()
    eventually(lambda: len(place.pool) == 0)
