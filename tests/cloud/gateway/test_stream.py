"""How slowly an edge may send a message, or take an answer: on a clock of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import pytest
import torch
from support.cloud.clouds import Home, ThreadServer
from support.cloud.sessions import channel
from support.protocol.wire import SMALL, new_pair

from isthmus.cloud.bounds import Bounds
from isthmus.cloud.gateway.stream import SealedStream, StalledError
from isthmus.cloud.session.served_model import Served
from isthmus.cloud.telemetry.metrics import Metrics
from isthmus.common.errors import ConnectionLostError, FrameError
from isthmus.protocol import messages as m
from isthmus.protocol.limits import TransferTimeout
from isthmus.protocol.secure.framing import seconds_left
from isthmus.protocol.session import Received
from isthmus.protocol.tensor_codecs import Role, codec_id, encode

TIMEOUT = TransferTimeout(stall_seconds=10, least_rate=100, message_seconds=60)


def test_a_message_has_the_time_of_its_bytes_and_no_more() -> None:
    assert seconds_left(TIMEOUT, 0, 0) == 10
    assert seconds_left(TIMEOUT, 4, 500) == 11
    assert seconds_left(TIMEOUT, 16, 500) == 0
    assert seconds_left(TIMEOUT, 0, 1 << 30) == 60  # whatever its size
    assert seconds_left(TIMEOUT, 61, 1 << 30) == 0


def test_a_forward_of_this_size_comes_in_many_frames() -> None:
    edge, _ = new_pair(limits=SMALL)
    assert len(list(edge.send(forward()))) > 20


def forward() -> m.Forward:
    payload = encode(torch.zeros(2, 12, 16), "fp32", Role.ACTIVATION)
    return m.Forward(m.CallId(1, 1), True, payload, None, None, codec_id("fp32"))


class Slow:
    """A clock, frames that come so many seconds apart, and a peer that takes so many seconds for each."""

    def __init__(self, seconds: float) -> None:
        self.now = 0.0
        self._seconds = seconds

    def clock(self) -> float:
        return self.now

    async def frames(self, frames: Iterable[bytes]) -> AsyncIterator[bytes]:
        for frame in frames:
            await self._pass()
            yield frame

    async def write(self, frame: bytes) -> None:
        await self._pass()

    async def _pass(self) -> None:
        self.now += self._seconds
        await asyncio.sleep(0.001)  # what has no time left does not wait at all


def received(seconds: float, frames: Callable[[Any], Iterable[bytes]]) -> Any:
    """What a server gets of an edge's frames that come so many seconds apart."""
    edge, cloud = new_pair(limits=SMALL)
    slow = Slow(seconds)
    stream = SealedStream(cloud, slow.frames(frames(edge)), slow, Metrics(), TIMEOUT, slow.clock)

    async def receive() -> Any:
        return await stream.receive(asyncio.Event())

    return asyncio.run(receive())


def test_a_message_whose_frames_come_too_far_apart_is_not_waited_for() -> None:
    assert isinstance(received(0.5, lambda edge: edge.send(forward())), Received)  # about 130 bytes a frame
    with pytest.raises(StalledError, match="bytes into a message"):
        received(5.0, lambda edge: edge.send(forward()))  # none of which stalls for ten seconds


def test_key_changes_gain_no_time() -> None:
    def changes(edge: Any) -> Iterable[bytes]:
        while True:
            yield edge.rekey()

    with pytest.raises(FrameError, match="more than 16 control frames"):
        received(0.1, changes)
    with pytest.raises(StalledError):
        received(5.0, changes)

    def one(edge: Any) -> Iterable[bytes]:
        yield edge.rekey()
        yield from edge.send(forward())

    assert isinstance(received(0.5, one), Received)
    with pytest.raises(StalledError):
        received(5.0, one)


def test_an_answer_that_is_taken_too_slowly_is_not_sent_on() -> None:
    def send(seconds: float) -> None:
        _, cloud = new_pair(limits=SMALL)
        slow = Slow(seconds)
        stream = SealedStream(cloud, slow.frames(()), slow, Metrics(), TIMEOUT, slow.clock)
        forward_reply = m.ForwardReply(m.CallId(1, 1), forward().hidden, 0, 0, 0)
        asyncio.run(stream.send(forward_reply))

    send(0.5)
    with pytest.raises(StalledError, match="not taken in time"):
        send(5.0)


def test_what_was_sent_has_the_time_of_its_bytes_to_arrive() -> None:
    _, cloud = new_pair(limits=SMALL)
    slow = Slow(0.0)
    stream = SealedStream(cloud, slow.frames(()), slow, Metrics(), TIMEOUT, slow.clock)
    slow.now = 5.0
    assert stream.in_transit == 0  # nothing was sent
    asyncio.run(stream.send(m.ForwardReply(m.CallId(1, 1), forward().hidden, 0, 0, 0)))
    carried = stream.in_transit
    assert carried > 2 * 12 * 16 * 4 / TIMEOUT.least_rate
    slow.now += 1
    asyncio.run(stream.send(m.Pong(1, 0)))
    assert stream.in_transit == pytest.approx(carried - 1)  # the longer one counts
    slow.now += 1000
    assert stream.in_transit == 0


def test_a_session_that_only_pings_is_ended(cloud: Served, home: Home) -> None:
    with ThreadServer(cloud, home, bounds=Bounds(pings_per_minute=3), clock=lambda: 0.0) as server:
        edge = channel(server)
        for nonce in range(3):
            assert isinstance(edge.ask(m.Ping(nonce), 20), m.Pong)
        with pytest.raises(ConnectionLostError, match="rules were broken"):
            edge.ask(m.Ping(3), 20)
        edge.abandon()
