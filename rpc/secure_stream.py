"""One sealed session over one stream: the handshake, then one question and one answer at a time.

The channel lives as long as its stream. What breaks it is a `ConnectionLostError` (the network's fault) or a
`RemoteProtocolError` (frames that do not open); either way it is closed, its keys are wiped, and the link opens
another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.common.errors import ConnectionLostError, OverQuotaError, RefusedError, RemoteProtocolError
from isthmus.common.terminal import printable
from isthmus.protocol import messages as m
from isthmus.protocol.limits import DEFAULT_LIMITS, Pace
from isthmus.protocol.secure.keys import Fingerprint
from isthmus.protocol.session import EdgeSession, Established, NeedSend, Received
from isthmus.rpc.transport import NothingYetError, Stream

T = TypeVar("T")

HANDSHAKE_SECONDS = 15.0
GOODBYE_SECONDS = 2.0
LOOK_SECONDS = 0.25  # between two looks at whether a wait is still wanted
LEAST_RATE = 16 << 10  # bytes a second that a cloud must take of a question, and send of an answer


@dataclass(slots=True)
class Traffic:
    """What went over a link so far. Bytes are those of whole frames, prefixes and tags included.

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


# Told of each phase as it begins: what is asked ("handshake", or the question's name: "forward", "backward", "attach",
# …), and how far it is ("sending", "waiting", "receiving", "idle").
Observer = Callable[[str, str], None]

# Called again and again while a wait lasts; what it raises ends the wait.
Check = Callable[[], None]


class RedirectedError(Exception):
    """A worker sends the edge to another one; `workers` says where. Never shown to anybody."""

    def __init__(self, workers: m.Workers) -> None:
        super().__init__(workers.go_to)
        self.workers = workers


class Channel:
    """An established session.

    Args:
        stream: a fresh stream to the cloud.
        pin: fingerprint of the cloud's root key.
        key: the edge's key.
        link: 16 bytes that name the link; a new channel of the same link takes the place of an older one in the cloud.
        traffic: the meter to count in.
        observer: told of the phases, for tests and benchmarks of faults.
        check: raises when nobody wants to wait any more; called a few times a second.
        interactive: whether somebody waits for the calls, which then come before training.
        deadline: seconds within which a call has to be computed; None for no deadline.
        settled: whether the worker must not send this edge to another one.
        clock: seconds that never go back.

    Attributes:
        info: what the cloud said of the session.
        workers: the addresses of the cloud's workers; empty where it has one and does not say.

    Raises:
        RedirectedError: the session is to be opened with another worker.
        ConnectionLostError: the stream broke.
        FingerprintError, NotEnrolledError, RefusedError, VersionError, RemoteProtocolError: see `EdgeSession.receive`.
    """

    def __init__(
        self,
        stream: Stream,
        pin: Fingerprint,
        key: Ed25519PrivateKey,
        link: bytes,
        traffic: Traffic,
        observer: Observer,
        check: Check = lambda: None,
        *,
        interactive: bool = False,
        deadline: float | None = None,
        settled: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._clock = clock
        self._check = check
        self._traffic = traffic
        self._observer = observer
        self._session = EdgeSession(pin=pin, edge_key=key, limits=DEFAULT_LIMITS)
        try:
            self.info = self._handshake()
            milliseconds = 0 if deadline is None else max(1, round(deadline * 1000))
            self.workers = self._attach(m.Attach(link, interactive, milliseconds, settled))
        except BaseException:
            self.abandon()
            raise
        traffic.sessions += 1

    def ask(self, question: m.Message, timeout: float, answer_bytes: int | None = None) -> m.Message:
        """Send a message and wait for the answer.

        The cloud has `timeout` seconds to take the question, as many until the answer begins, and as many to send it;
        for question and answer also what their bytes take at `LEAST_RATE`.

        Args:
            question: what to send.
            timeout: see above.
            answer_bytes: the most bytes of the answer's body; None for all that the session's limits accept.

        Raises:
            ConnectionLostError: the stream broke, the cloud ended the session, or was too slow.
            RemoteProtocolError: a frame did not open, or the cloud broke the protocol.
        """
        traffic = self._traffic
        name = type(question).__name__.lower()
        self._observer(name, "sending")
        self._session.expect(answer_bytes)
        pace = Pace(timeout, LEAST_RATE, math.inf)
        frames = self._session.send(question)
        begun, size = self._clock(), 0
        while True:
            before = time.perf_counter_ns()
            frame = next(frames, None)
            traffic.crypto_ns += time.perf_counter_ns() - before
            if frame is None:
                break
            self._send(frame, pace.left(self._clock() - begun, size))
            size += len(frame)
        self._observer(name, "waiting")
        begun, size = self._clock(), 0
        while True:
            frame = self._receive(pace.left(self._clock() - begun, size))
            if not size:
                begun = self._clock()
                self._observer(name, "receiving")
            size += len(frame)
            before = time.perf_counter_ns()
            event = self._session.receive(frame)
            traffic.crypto_ns += time.perf_counter_ns() - before
            if isinstance(event, Received):
                break
        self._observer(name, "idle")
        traffic.round_trips += 1
        if isinstance(event.message, m.Goodbye):
            raise ConnectionLostError(f"the cloud ended the session: {printable(event.message.reason)}")
        return event.message

    def close(self) -> None:
        """Say goodbye and close."""
        if self._session.established:
            try:
                for frame in self._session.send(m.Goodbye("done")):
                    self._send(frame, GOODBYE_SECONDS)
                self._stream.finish(GOODBYE_SECONDS)
            except ConnectionLostError:
                pass  # it is over either way
        self.abandon()

    def abandon(self) -> None:
        """Close without a word."""
        self._session.close()
        self._stream.close()

    def _handshake(self) -> m.SessionInfo:
        self._observer("handshake", "sending")
        self._send(self._session.start(), HANDSHAKE_SECONDS)
        while True:
            event = self._session.receive(self._receive(HANDSHAKE_SECONDS))
            match event:
                case NeedSend(frames):
                    for frame in frames:
                        self._send(frame, HANDSHAKE_SECONDS)
                case Established(info):
                    return info
                case _:
                    raise RemoteProtocolError("the cloud left the handshake's order")

    def _attach(self, attach: m.Attach) -> tuple[str, ...]:
        status = self.ask(attach, HANDSHAKE_SECONDS, answer_bytes=0)
        if isinstance(status, m.Workers):
            if status.go_to:
                raise RedirectedError(status)
            return status.addresses
        if not isinstance(status, m.Status):
            raise RemoteProtocolError(f"the cloud answered Attach with {type(status).__name__}")
        if status.code == m.StatusCode.OVER_QUOTA:
            raise OverQuotaError(printable(status.message))
        if status.code != m.StatusCode.OK:
            raise RefusedError(printable(status.message))
        return ()

    def _send(self, frame: bytes, timeout: float) -> None:
        self._patiently(timeout, lambda left: self._stream.send(frame))
        self._traffic.bytes_up += len(frame)

    def _receive(self, timeout: float) -> bytes:
        frame = self._patiently(timeout, self._stream.receive)
        self._traffic.bytes_down += len(frame)
        return frame

    def _patiently(self, timeout: float, wait: Callable[[float], T]) -> T:
        """Repeat a short wait for `timeout` seconds, as long as it is wanted."""
        deadline = self._clock() + timeout
        while True:
            self._check()
            left = deadline - self._clock()
            try:
                return wait(min(LOOK_SECONDS, max(0.0, left)))
            except NothingYetError:
                if left <= LOOK_SECONDS:
                    raise ConnectionLostError(f"no answer within {timeout:.0f} s") from None
