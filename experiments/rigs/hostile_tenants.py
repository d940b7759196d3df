"""Tenants that misbehave, and a stranger who is none: what they do to a cloud, in a process of its own.

Each question is a name of `DEEDS` or `ENDED` and seconds; it is done to all workers at once, and answered when it is
done. What the cloud does to defend itself (it ends sessions, say) is no error here.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from isthmus.common.errors import ConnectionLostError, IsthmusError, RefusedError
from isthmus.common.torch_threads import set_torch_threads
from isthmus.experiments.harness.blocking_stream import SEND_SECONDS, BlockingStream, NothingYetError
from isthmus.experiments.harness.processes import Parent, TaskProcess, serve
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import ConnectionString
from isthmus.protocol.limits import DEFAULT_LIMITS, MIB, Limits
from isthmus.protocol.secure.keys import load_edge
from isthmus.protocol.session import EdgeSession, NeedSend, Received
from isthmus.protocol.tensor_codecs import Role, codec_id, encode

WAIT_SECONDS = 20.0
HALF_OPEN = 96  # more than a cloud allows
SESSIONS = 4  # what a tenant may have by default
LOWEST = 19  # priority
_ENDLESS: Final = replace(
    DEFAULT_LIMITS,
    rekey_bytes=1 << 60,
    rekey_frames=1 << 60,
    rekey_seconds=math.inf,
    renew_bytes=1 << 60,
    renew_seconds=math.inf,
)
_RENEWING: Final = replace(DEFAULT_LIMITS, renew_bytes=0)
AHEAD = 8  # calls that a flooding session has unanswered


class Session:
    """A session by hand: whoever has it decides what is read and when.

    Attributes:
        computed: Calls that the cloud has computed and answered so far.
    """

    def __init__(self, where: ConnectionString, key: Path, limits: Limits = DEFAULT_LIMITS) -> None:
        self.computed = 0
        self.stream = BlockingStream(where.address, connect_timeout=WAIT_SECONDS)
        self._edge = EdgeSession(pin=where.pin, edge_key=load_edge(key), limits=limits)
        try:
            self._establish()
        except IsthmusError:
            self.stream.close()  # the cloud may have a session of it
            raise

    @property
    def info(self) -> m.SessionInfo:
        """What the cloud says of itself."""
        if self._edge.info is None:
            raise IsthmusError("the session has not been established")
        return self._edge.info

    def forward(self, number: int, rows: int, seq: int) -> m.Forward:
        """A call of zeros, `[rows, seq, hidden_size]`, whose forward state is to be kept."""
        payload = encode(torch.zeros(rows, seq, self.info.hidden_size), "fp32", Role.ACTIVATION)
        return m.Forward(m.CallId(1, number), True, payload, None, None, codec_id("fp32"))

    def seal(self, message: m.Message) -> Iterator[bytes]:
        """Its frames."""
        return self._edge.send(message)

    def rekey(self) -> bytes:
        """The frame that changes the key."""
        return self._edge.rekey()

    def send(self, message: m.Message) -> None:
        """Send it whole. Raises NothingYetError where the cloud takes no more for a while."""
        for frame in self.seal(message):
            self.stream.send(frame)

    def receive(self, seconds: float = WAIT_SECONDS) -> m.Message:
        """The next message. Raises NothingYetError where a frame takes longer to come."""
        while True:
            event = self._edge.receive(self.stream.receive(seconds))
            if isinstance(event, Received):
                self.computed += isinstance(event.message, m.ForwardReply)
                return event.message

    def ask(self, message: m.Message, seconds: float = WAIT_SECONDS) -> m.Message:
        """Send a message; returns the next one that comes. Raises NothingYetError as `receive` does."""
        self.send(message)
        return self.receive(seconds)

    def _establish(self) -> None:
        """Shake hands and attach."""
        self.stream.send(self._edge.start())
        flight = self._edge.receive(self.stream.receive(WAIT_SECONDS))
        if isinstance(flight, NeedSend):
            self.stream.send(flight.frames[0])
        self._edge.receive(self.stream.receive(WAIT_SECONDS))
        self.ask(m.Attach(os.urandom(16), settled=True))


class Hostile:
    """Does what it is asked to.

    Args:
        cloud: the connection string of the worker that it does it to.
        batch: sequences of a call.
        seq: their tokens.

    Attributes:
        computed: Calls that the cloud has computed for it, of each session that has ended.
    """

    def __init__(self, cloud: str, key: Path, batch: int, seq: int, seed: int = 0) -> None:
        self._where = ConnectionString.parse(cloud)
        self._key = key
        self._shape = (batch, seq)
        self._random = random.Random(seed)  # noqa: S311 - no secret
        self.computed: list[int] = []

    def garbage(self, seconds: float) -> None:
        """Noise instead of TLS or HTTP/2, noise instead of a handshake, and a changed frame within a session."""
        for _ in during(seconds):
            where = (self._where.host, self._where.port)
            with contextlib.suppress(OSError), socket.create_connection(where, WAIT_SECONDS) as plain:
                plain.sendall(self._random.randbytes(self._random.randrange(1, 4096)))
            with contextlib.suppress(ConnectionLostError), self._stream() as stream:
                stream.send(self._random.randbytes(self._random.randrange(1, 1 << 16)))
                stream.receive(WAIT_SECONDS)
            with contextlib.suppress(ConnectionLostError), self._session() as session:
                frame = bytearray(next(session.seal(m.Ping(1))))
                frame[self._random.randrange(len(frame))] ^= 1 << self._random.randrange(8)
                session.stream.send(bytes(frame))
                session.stream.receive(WAIT_SECONDS)

    def flood(self, seconds: float) -> None:
        """Calls as fast as the cloud takes them, over all sessions that it allows, with forward states to keep."""
        with ThreadPoolExecutor(SESSIONS) as pool:
            list(pool.map(self._flood, [seconds] * SESSIONS))

    def held_sessions(self, seconds: float) -> None:
        """Open as many sessions and half of as many handshakes as there can be, and leave them so."""
        with contextlib.ExitStack() as stack:
            for _ in range(SESSIONS):
                with contextlib.suppress(ConnectionLostError):
                    stack.enter_context(self._session())
            end = time.monotonic() + seconds
            while time.monotonic() < end:  # the cloud ends them, and they come again
                with contextlib.ExitStack() as half:
                    for _ in range(HALF_OPEN):
                        with contextlib.suppress(ConnectionLostError):
                            half.enter_context(self._stream())
                    time.sleep(min(1.0, max(0.0, end - time.monotonic())))

    def slow_reader(self, seconds: float) -> None:
        """Ask until the cloud takes no more questions, as nobody takes its answers."""
        end = time.monotonic() + seconds
        with contextlib.suppress(ConnectionLostError), self._session() as session:
            for number in during(seconds):
                for frame in session.seal(self._forward(session, number)):
                    self._send(session.stream, frame, end)

    def slow_writer(self, seconds: float) -> None:
        """Begin a message of the largest size, and send its frames far apart."""
        end = time.monotonic() + seconds
        with contextlib.suppress(ConnectionLostError), self._session() as session:
            rows = (8 << 20) // (4 * session.info.hidden_size * self._shape[1])
            for frame in session.seal(session.forward(1, rows, self._shape[1])):
                self._send(session.stream, frame, end)
                time.sleep(min(1.0, max(0.0, end - time.monotonic())))
                if time.monotonic() >= end:
                    return

    def rekeys(self, seconds: float) -> None:
        """Change the key of a session every second, and send nothing else."""
        end = time.monotonic() + seconds
        with contextlib.suppress(ConnectionLostError), self._session() as session:
            while time.monotonic() < end:
                session.stream.send(session.rekey())
                with contextlib.suppress(NothingYetError):
                    session.stream.receive(min(1.0, max(0.0, end - time.monotonic())))

    def endless_key(self, seconds: float) -> None:
        """Messages of 8 MiB, which the cloud refuses to compute, under a key that is never changed."""
        end = time.monotonic() + seconds
        with contextlib.suppress(ConnectionLostError), self._session(_ENDLESS) as session:
            rows = (8 * MIB) // (4 * session.info.hidden_size * self._shape[1])
            large = session.forward(1, rows, self._shape[1])
            for _ in during(seconds):
                for frame in session.seal(large):
                    self._send(session.stream, frame, end)
                session.receive(_left(end))

    def renewals(self, seconds: float) -> None:
        """Offer fresh keys before every message; and again in another session, where that one was ended."""
        for _ in during(seconds):
            with contextlib.suppress(ConnectionLostError), self._session(_RENEWING) as session:
                for number in during(seconds):
                    session.ask(m.Ping(number))

    def session_pings(self, seconds: float) -> None:
        """Ping a session as fast as it answers, and ask nothing else."""
        with contextlib.suppress(ConnectionLostError), self._session() as session:
            for number in during(seconds):
                session.ask(m.Ping(number))

    def stash_evicted(self, seconds: float) -> None:
        """Have one forward state after the other kept, so that those of everybody else must go."""
        with contextlib.suppress(ConnectionLostError), self._session() as session:
            for number in during(seconds):
                session.ask(self._forward(session, number))

    def further_tenant(self, seconds: float) -> None:
        """Nothing bad: a forward and its backward, one after the other, as any tenant more would."""
        with contextlib.suppress(ConnectionLostError), self._session() as session:
            gradient = encode(torch.ones(*self._shape, session.info.hidden_size), "fp32", Role.GRADIENT)
            for number in during(seconds):
                forward = self._forward(session, number)
                session.ask(forward)
                session.ask(m.Backward(forward.id, gradient, None, forward.reply_codec))

    def _flood(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        with contextlib.suppress(ConnectionLostError), self._session() as session:
            answered = 0
            for number in during(seconds):
                for frame in session.seal(self._forward(session, number)):
                    answered += self._send(session.stream, frame, end, session.receive)
                if number - answered > AHEAD:
                    session.receive(_left(end))
                    answered += 1

    def _forward(self, session: Session, number: int) -> m.Forward:
        return session.forward(number, *self._shape)

    def _send(
        self,
        stream: BlockingStream,
        frame: bytes,
        end: float,
        read: Callable[[float], object] | None = None,
    ) -> int:
        """Send a frame, however long the cloud does not take it, up to a time.

        Args:
            read: Reads an answer, given seconds to wait for it: a cloud that has answers unread may take no more.

        Returns:
            How many answers were read meanwhile.
        """
        answered = 0
        while time.monotonic() < end:
            with contextlib.suppress(NothingYetError):
                stream.send(frame)
                break
            if read is not None:
                with contextlib.suppress(NothingYetError):
                    read(SEND_SECONDS)
                    answered += 1
        return answered

    @contextlib.contextmanager
    def _stream(self) -> Iterator[BlockingStream]:
        with contextlib.closing(BlockingStream(self._where.address, connect_timeout=WAIT_SECONDS)) as stream:
            yield stream

    @contextlib.contextmanager
    def _session(self, limits: Limits = DEFAULT_LIMITS) -> Iterator[Session]:
        session = Session(self._where, self._key, limits)
        try:
            yield session
        finally:
            session.stream.close()
            self.computed.append(session.computed)


def _left(end: float) -> float:
    """Seconds to wait for an answer: up to the deed's end, as a message that it cut short is never answered."""
    return max(0.1, end - time.monotonic())


def during(seconds: float) -> Iterator[int]:
    """1, 2, 3 … until so much time is over."""
    end = time.monotonic() + seconds
    return itertools.takewhile(lambda _: time.monotonic() < end, itertools.count(1))


CONTROL: Final = "further_tenant"
"""What a tenant that behaves does: it slows the others down, too, and a hostile one should not do so much more."""
ENDED: Final = ("rekeys", "endless_key", "renewals", "session_pings")
"""What a cloud ends at once, so that it slows nobody down."""
COMPUTED: Final = ("flood", "stash_evicted", CONTROL)
"""What makes the cloud compute, and reads its answers."""
DEEDS: Final = ("garbage", "flood", "held_sessions", "slow_reader", "slow_writer", "stash_evicted", CONTROL)


def hostile_process(task: dict[str, Any], log: Path) -> TaskProcess:
    """The process; ask it for `[deed, seconds]`, and it answers when that is done.

    Args:
        task: the arguments of `Hostile` by name, and for `cloud`, in `workers`, all workers' connection strings.
    """
    return TaskProcess("the hostile tenant", "isthmus.experiments.rigs.hostile_tenants", task, log=log)


def yield_to_all() -> None:
    """Take the lowest priority: in this session's group, and of the group where Linux schedules by sessions."""
    os.nice(LOWEST)
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(LOWEST))


def main(parent: Parent) -> None:
    """Do what the questions say; see the module."""
    task = parent.task
    yield_to_all()  # elsewhere it would take none of these cores: what it makes the cloud do is what counts
    set_torch_threads(1)
    rest = (Path(task["key"]), task["batch"], task["seq"], task["seed"])
    tenants = [Hostile(worker, *rest) for worker in task["workers"]]

    def do(tenant: Hostile, deed: str, seconds: float) -> None:
        with contextlib.suppress(ConnectionLostError, RefusedError):
            getattr(tenant, deed)(seconds)

    with ThreadPoolExecutor(len(tenants)) as pool:
        for deed, seconds in parent.questions():
            for done in [pool.submit(do, tenant, deed, seconds) for tenant in tenants]:
                done.result()
            parent.say()


if __name__ == "__main__":
    serve(main)
