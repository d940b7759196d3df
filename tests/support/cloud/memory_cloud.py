"""A cloud without a network or a clock, and a transport that spoils what passes through it.

`MemoryTransport` hands every frame straight to a `CloudSession` and a `TenantSession`, so a test of the link takes
milliseconds and goes the same way each time. As in the real server, a message's bytes are overwritten when its turn is
over.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from support.protocol.wire import EDGE, NOW, PIN, TENANT, identity

from isthmus.cloud.engine.paused_calls import CallThreads
from isthmus.cloud.session.handler import TenantSession
from isthmus.cloud.session.served_model import Served
from isthmus.common.errors import ConnectionLostError, RemoteProtocolError
from isthmus.edge.client import session_keeper
from isthmus.edge.client.link import Link
from isthmus.privacy.transcript.chain import CloudTranscript, Session, digest
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import pack, unpack
from isthmus.protocol.enrolment import Tenant
from isthmus.protocol.secure.framing import wipe
from isthmus.protocol.session import CloudSession, Received
from isthmus.rpc.transport import Stream, Transport


@dataclass
class MemoryCloud:
    """What the streams of a `MemoryTransport` lead to; a test may change it between two calls."""

    served: Served
    authorize: Callable[[bytes], Tenant] = lambda key: TENANT
    seen: list[m.Message] = field(default_factory=list)  # everything that an edge has sent
    sessions: list[str] = field(default_factory=list)  # ids, in the order of their handshakes
    answer: Callable[[m.Message], m.Message | None] = lambda message: (
        None
    )  # a test's own answer instead of the real one
    spoil: Callable[[m.Message], m.Message] = lambda answer: answer  # what becomes of the real answer
    threads: CallThreads = field(default_factory=lambda: CallThreads(1, 16))
    streams: list[_MemoryStream] = field(default_factory=list)  # in the order of their opening
    numerics: str = "fp32, here"
    not_after: int = NOW * 2  # when its certificate expires, in Unix seconds
    ahead: float = 0.0  # seconds that its clock is ahead
    signs: Callable[[m.Message], m.Message] = lambda signed: signed  # what becomes of its signature

    def describe(self, tenant: Tenant, session_id: bytes) -> m.SessionInfo:
        self.sessions.append(session_id.hex())
        return self.describe_again(session_id)

    def describe_again(self, session_id: bytes) -> m.SessionInfo:
        return replace(self.served.info, session_id=session_id.hex(), numerics=self.numerics)


class MemoryTransport:
    """Opens streams to a `MemoryCloud`."""

    def __init__(self, cloud: MemoryCloud) -> None:
        self.cloud = cloud
        self.up = True  # a cloud that is down takes no streams
        self.opened = 0

    async def open(self) -> Stream:
        self.opened += 1
        if not self.up:
            raise ConnectionLostError("the cloud is down")
        self.cloud.streams.append(_MemoryStream(self.cloud))
        return self.cloud.streams[-1]

    async def close(self) -> None:
        pass


class _MemoryStream:
    def __init__(self, cloud: MemoryCloud) -> None:
        self._cloud = cloud
        self._session = CloudSession(
            identity=identity(not_after=cloud.not_after), authorize=cloud.authorize, info=cloud.describe
        )
        self._work: TenantSession | None = None
        self._transcript: CloudTranscript | None = None
        self._answers: deque[bytes] = deque()
        self.is_open = True

    async def send(self, frame: bytes) -> None:
        await asyncio.to_thread(self._take, frame)  # the cloud computes elsewhere than the edge's event loop

    async def receive(self) -> bytes:
        if not self._answers:
            raise ConnectionLostError("no answer")
        return self._answers.popleft()

    async def finish(self) -> None:
        await self.close()

    async def close(self) -> None:
        self._end()

    def _take(self, frame: bytes) -> None:
        if not self.is_open:
            raise ConnectionLostError("the stream is closed")
        try:
            event = self._session.receive(frame)
        except RemoteProtocolError:
            self._end()  # as the real server: a stream whose rules were broken ends
            return
        self._answers.extend(event.frames)
        if isinstance(event, Received):
            try:
                answer = self._answer(event.message)
            finally:
                wipe(event.body)
            if answer is not None:
                self._answers.extend(self._session.send(answer))

    def _end(self) -> None:
        self.is_open = False
        if self._work is not None:
            self._work.close()

    def _answer(self, message: m.Message) -> m.Message | None:
        self._cloud.seen.append(_copied(message))
        own = self._cloud.answer(message)
        if own is not None:
            return own
        served = self._cloud.served
        if isinstance(message, m.Attach):
            session_id = bytes.fromhex(self._cloud.sessions[-1])
            if self._session.tenant is None:
                raise AssertionError("the session does not stand")
            self._work = served.session(session_id, self._session.tenant, self._cloud.threads)
            if message.transcript:
                described = Session.of(self._cloud.describe_again(session_id))
                self._transcript = CloudTranscript(described, lambda: identity(not_after=self._cloud.not_after))
            return m.Status(m.StatusCode.OK, None, "attached")
        if self._work is None:
            raise AssertionError("the link spoke before it attached")
        if isinstance(message, m.SignTranscript) and self._transcript is not None:
            return self._cloud.signs(self._transcript.sign(message, time.time() + self._cloud.ahead))
        sent = digest(message)  # before the answer, which may overwrite what came
        answer = self._work.handle(message)
        if answer is None:
            return None
        answer = self._cloud.spoil(answer)
        if self._transcript is not None:
            self._transcript.answered(message, sent, answer)
        return answer


def _copied(message: m.Message) -> m.Message:
    """The same message over bytes of its own."""
    header, buffers = pack(message)
    return unpack(header, bytearray(b"".join(buffers)))


# A fault takes a frame and says what arrives in its place; "cut" breaks the stream instead.
Fault = Callable[[bytes], list[bytes]] | None
CUT: Fault = None


def flip(frame: bytes) -> list[bytes]:
    """One bit in the middle."""
    place = len(frame) // 2
    return [frame[:place] + bytes([frame[place] ^ 1]) + frame[place + 1 :]]


def truncate(frame: bytes) -> list[bytes]:
    """Without its last byte."""
    return [frame[:-1]]


def repeat(frame: bytes) -> list[bytes]:
    """Twice."""
    return [frame, frame]


def lose(frame: bytes) -> list[bytes]:
    """Not at all."""
    return []


FAULTS: Mapping[str, Fault] = {"cut": CUT, "flip": flip, "truncate": truncate, "repeat": repeat, "lose": lose}


class FaultyTransport:
    """Spoils single frames: `{("send", 5): flip}` is the fifth frame that the edge sends, over all streams."""

    def __init__(self, inner: Transport, faults: Mapping[tuple[str, int], Fault]) -> None:
        self._inner = inner
        self.faults = dict(faults)
        self.counts = {"send": 0, "receive": 0}
        self.hit: list[tuple[str, int]] = []

    async def open(self) -> Stream:
        return _FaultyStream(await self._inner.open(), self)

    async def close(self) -> None:
        await self._inner.close()

    def pass_on(self, way: str, frame: bytes) -> list[bytes]:
        """Count a frame; returns what arrives of it. Raises ConnectionLostError for a cut."""
        self.counts[way] += 1
        place = (way, self.counts[way])
        if place not in self.faults:
            return [frame]
        self.hit.append(place)
        fault = self.faults.pop(place)
        if fault is None:
            raise ConnectionLostError(f"cut at {place}")
        return fault(frame)


class _FaultyStream:
    def __init__(self, inner: Stream, transport: FaultyTransport) -> None:
        self._inner = inner
        self._transport = transport
        self._arrived: deque[bytes] = deque()

    async def send(self, frame: bytes) -> None:
        for each in await self._pass("send", frame):
            await self._inner.send(each)

    async def receive(self) -> bytes:
        while not self._arrived:
            self._arrived.extend(await self._pass("receive", await self._inner.receive()))
        return self._arrived.popleft()

    async def finish(self) -> None:
        await self._inner.finish()

    async def close(self) -> None:
        await self._inner.close()

    async def _pass(self, way: str, frame: bytes) -> list[bytes]:
        try:
            return self._transport.pass_on(way, frame)
        except ConnectionLostError:
            await self._inner.close()
            raise


def messages(cloud: MemoryCloud, kind: type[Any]) -> list[Any]:
    """What the edge has sent of one kind."""
    return [message for message in cloud.seen if isinstance(message, kind)]


def new_link(to: MemoryCloud | Transport, **options: Any) -> Link:
    """An open link to a cloud, or over a transport to one."""
    transport = MemoryTransport(to) if isinstance(to, MemoryCloud) else to
    link = Link(transport, PIN, EDGE, name="cloud:1", **options)
    link.open(5)
    return link


def comes_back(
    transport: MemoryTransport, when: Callable[[], bool], pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Have a cloud away until `when` says otherwise, which is asked whenever the link pauses.

    Args:
        pauses: Gets the seconds of each pause, which takes no time.
    """
    transport.up = False

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        transport.up = when()

    monkeypatch.setattr(session_keeper.time, "sleep", sleep)


class StillTime:
    """In the place of the module `time`: a clock that moves only by sleeping.

    Attributes:
        pauses: how long was slept each time.
    """

    perf_counter_ns = staticmethod(time.perf_counter_ns)

    def __init__(self) -> None:
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return sum(self.pauses)

    def time(self) -> float:
        return 1000 + sum(self.pauses)

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
