"""One sealed session over one stream: the handshake, `Attach`, then one question and one answer at a time.

The session lives as long as its stream. What breaks it is a `ConnectionLostError` (the network's fault) or a
`RemoteProtocolError` (frames that do not open). Either way, and when a wait is cancelled, whoever has the session
abandons it, which wipes its keys, and opens another.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.common.errors import ConnectionLostError, RefusedError, RemoteProtocolError, TooManySessionsError
from isthmus.common.terminal import printable
from isthmus.protocol import messages as m
from isthmus.protocol.limits import DEFAULT_LIMITS, Limits, TransferTimeout
from isthmus.protocol.secure.framing import seconds_left
from isthmus.protocol.secure.keys import Fingerprint
from isthmus.protocol.service import GOODBYE_SECONDS
from isthmus.protocol.session import EdgeSession, Established, NeedSend, Received
from isthmus.rpc.transport import Stream

T = TypeVar("T")

HANDSHAKE_SECONDS = 15.0


@dataclass(slots=True)
class Traffic:
    """What went over the sessions of one client so far. Bytes are those of whole frames, prefixes and tags included.

    Times are in nanoseconds.
    """

    bytes_up: int = 0
    bytes_down: int = 0
    calls: int = 0
    round_trips: int = 0  # questions that were answered: one for a call, and one for each of its pauses
    retries: int = 0
    sessions: int = 0
    asking_ns: int = 0  # from a question to its answer, with every failed attempt, pause and handshake in between
    crypto_ns: int = 0  # sealing and opening, on both sides
    compute_ns: int = 0  # the span itself, as the cloud reports it
    sites_ns: int = 0  # what the edge computed meanwhile, for adapters inside the span
    queue_ns: int = 0  # the rest of the cloud's handling (waiting for its turn, codecs), as the cloud reports it

    def answered(self, answer: m.Message) -> None:
        """Count an answer, and the times that the cloud reports with it."""
        self.round_trips += 1
        if isinstance(answer, m.Timed):
            self.compute_ns += answer.compute_ns
            self.queue_ns += answer.queue_ns
            self.crypto_ns += answer.crypto_ns


# Called at each phase as it begins, on the event loop, which it must not wait for: what is asked ("handshake", or the
# question's name: "forward", "backward", "attach", …), and how far it is ("sending", "waiting", "receiving", "idle").
Observer = Callable[[str, str], None]


class RedirectedError(RefusedError):
    """A worker sends the edge to another one; `workers` says where. Never shown to anybody."""

    def __init__(self, workers: m.Workers) -> None:
        super().__init__(workers.go_to)
        self.workers = workers


class SecureStream:
    """An established session; `open` makes one. For one event loop, and one question at a time.

    Attributes:
        info: what the cloud said of the session.
        workers: the addresses of the cloud's workers; empty where it has one and does not say.
    """

    info: m.SessionInfo
    workers: tuple[str, ...] = ()

    def __init__(
        self, stream: Stream, session: EdgeSession, traffic: Traffic, observer: Observer, clock: Callable[[], float]
    ) -> None:
        self._stream = stream
        self._session = session
        self._traffic = traffic
        self._observer = observer
        self._clock = clock

    @classmethod
    async def open(
        cls,
        stream: Stream,
        pin: Fingerprint,
        key: Ed25519PrivateKey,
        attach: m.Attach,
        *,
        limits: Limits = DEFAULT_LIMITS,
        traffic: Traffic | None = None,
        observer: Observer = lambda question, phase: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> SecureStream:
        """Shake hands and attach.

        Args:
            stream: a fresh stream to the cloud; it is closed where this raises.
            pin: fingerprint of the cloud's root key.
            key: the client's key.
            attach: what the client says first. A session takes the place of an older one of the same link.
            limits: what the session accepts, and when it changes and renews its keys.
            traffic: the meter to count in.
            observer: called at each phase, for tests and benchmarks of faults.
            clock: seconds that never go back.

        Raises:
            RedirectedError: the session is to be opened with another worker.
            ConnectionLostError: the stream broke.
            FingerprintError, NotEnrolledError, RefusedError, VersionError, RemoteProtocolError: see
                `EdgeSession.receive`.
        """
        session = EdgeSession(pin=pin, edge_key=key, limits=limits)
        opened = cls(stream, session, traffic or Traffic(), observer, clock)
        try:
            opened.info = await opened._handshake()
            opened.workers = await opened._attach(attach)
        except BaseException:
            await opened.abandon()
            raise
        opened._traffic.sessions += 1
        return opened

    async def ask(self, question: m.Message, timeout: float = math.inf, answer_bytes: int | None = None) -> Received:
        """Send a message and wait for the answer.

        The cloud has `timeout` seconds to take the question, as many until the answer begins, and as many to send it;
        for question and answer also what their bytes take at `TransferTimeout.least_rate`.

        Args:
            question: what to send.
            timeout: see above.
            answer_bytes: the most bytes of the answer's body; None for all that the session's limits accept.

        Raises:
            ConnectionLostError: the stream broke, the cloud ended the session, or was too slow.
            RemoteProtocolError: a frame did not open, or the cloud broke the protocol.
        """
        name = type(question).__name__.lower()
        transfer = TransferTimeout(timeout, message_seconds=math.inf)
        self._observer(name, "sending")
        self._session.expect(answer_bytes)
        begun, size = self._clock(), 0
        for frame in self._sealed(question):
            await self._send(frame, seconds_left(transfer, self._clock() - begun, size))
            size += len(frame)
        self._observer(name, "waiting")
        begun, size = self._clock(), 0
        while True:
            frame = await self._receive(seconds_left(transfer, self._clock() - begun, size))
            if not size:
                begun = self._clock()
                self._observer(name, "receiving")
            size += len(frame)
            before = time.perf_counter_ns()
            event = self._session.receive(frame)
            self._traffic.crypto_ns += time.perf_counter_ns() - before
            if isinstance(event, Received):
                break
        self._observer(name, "idle")
        self._traffic.answered(event.message)
        if isinstance(event.message, m.Goodbye):
            raise ConnectionLostError(f"the cloud ended the session: {printable(event.message.reason)}")
        return event

    async def close(self) -> None:
        """Say goodbye, where that is still possible, and close."""
        try:
            if self._session.established:
                async with asyncio.timeout(GOODBYE_SECONDS):
                    for frame in self._session.send(m.Goodbye("done")):
                        await self._stream.send(frame)
                    await self._stream.finish()
        except (ConnectionLostError, TimeoutError):
            pass  # it is over either way
        finally:
            await self.abandon()

    async def abandon(self) -> None:
        """Close without a word, and overwrite the keys."""
        self._session.close()
        await self._stream.close()

    async def _handshake(self) -> m.SessionInfo:
        self._observer("handshake", "sending")
        await self._send(self._session.start(), HANDSHAKE_SECONDS)
        while True:
            event = self._session.receive(await self._receive(HANDSHAKE_SECONDS))
            match event:
                case NeedSend(frames):
                    for frame in frames:
                        await self._send(frame, HANDSHAKE_SECONDS)
                case Established(info):
                    return info
                case _:
                    raise RemoteProtocolError("the cloud left the handshake's order")

    async def _attach(self, attach: m.Attach) -> tuple[str, ...]:
        status = (await self.ask(attach, HANDSHAKE_SECONDS, answer_bytes=0)).message
        if isinstance(status, m.Workers):
            if status.go_to:
                raise RedirectedError(status)
            return status.addresses
        if not isinstance(status, m.Status):
            raise RemoteProtocolError(f"the cloud answered Attach with {type(status).__name__}")
        if status.code == m.StatusCode.OVER_QUOTA:
            raise TooManySessionsError(printable(status.message))
        if status.code != m.StatusCode.OK:
            raise RefusedError(printable(status.message))
        return ()

    def _sealed(self, message: m.Message) -> Iterator[bytes]:
        """The frames of a message. Each is sealed when it is asked for, and the time of that is counted."""
        before = time.perf_counter_ns()
        for frame in self._session.send(message):
            self._traffic.crypto_ns += time.perf_counter_ns() - before
            yield frame
            before = time.perf_counter_ns()

    async def _send(self, frame: bytes, seconds: float) -> None:
        await _within(seconds, self._stream.send(frame))
        self._traffic.bytes_up += len(frame)

    async def _receive(self, seconds: float) -> bytes:
        frame = await _within(seconds, self._stream.receive())
        self._traffic.bytes_down += len(frame)
        return frame


async def _within(seconds: float, wait: Coroutine[None, None, T]) -> T:
    try:
        async with asyncio.timeout(None if seconds == math.inf else seconds):
            return await wait
    except TimeoutError:
        raise ConnectionLostError(f"no answer within {seconds:.0f} s") from None
