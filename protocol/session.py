"""The session: what the edge and the cloud drive. Frames in, events out; messages in, frames out.

Rules
    1. One frame is one message of the stream that carries it. Whoever drives a session hands every frame that arrives
       to `receive`, sends the frames of the event that comes back, and then looks at the event.
    2. `LocalProtocolError` is a misuse by this side, `RemoteProtocolError` a fault of the other. After the latter,
       after a refusal and after `close` the session is dead: its keys are overwritten and every call raises.
    3. A side takes only messages that the other may send.
    4. One thread may send while another receives; two threads must not do the same.

Theory of operation
    edge     start() -> CLIENT_HELLO                       cloud
             receive(SERVER_HELLO) -> NeedSend             receive(CLIENT_HELLO) -> NeedSend
             receive(SERVER_DONE) -> Established           receive(CLIENT_AUTH) -> Established, or Refused
             then send(message) -> frames, receive(frame) -> Received or Incomplete, on both sides alike

    The edge says before it waits how large an answer may be (`expect`): as large as what it asked for.
    Of a message of more bytes than its tenant may have in flight, the cloud keeps none: it gets Oversized.

    The edge raises what a refusal means: NotEnrolledError or RefusedError, with the cloud's text.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.common.errors import (
    DrainingError,
    FingerprintError,
    IsthmusError,
    LocalProtocolError,
    MessageError,
    NotEnrolledError,
    OverQuotaError,
    RefusedError,
    RemoteProtocolError,
    VersionError,
)
from isthmus.common.terminal import printable
from isthmus.protocol.encoding import pack, pack_info, peek, unpack, unpack_info
from isthmus.protocol.enrolment import Tenant
from isthmus.protocol.limits import DEFAULT_LIMITS, GIB, Buffer, Limits
from isthmus.protocol.messages import CLOUD_SENDS, EDGE_SENDS, MAX_TEXT, CallId, Message, SessionInfo, StatusCode, cut
from isthmus.protocol.secure.framing import Direction
from isthmus.protocol.secure.handshake import (
    SESSION_ID_BYTES,
    ClientHandshake,
    ServerHandshake,
    Verdict,
    version_refusal,
)
from isthmus.protocol.secure.keys import Fingerprint, WorkerIdentity
from isthmus.protocol.secure.record import Opener, Sealer
from isthmus.protocol.secure.renewal import CloudRenewal, EdgeRenewal

# However much the cloud says that it takes: it does not decide how much the edge may be made to allocate.
MAX_EDGE_MESSAGE_BYTES = 4 * GIB


def edge_limits(info: SessionInfo, own: Limits = DEFAULT_LIMITS) -> Limits:
    """What an edge accepts: its own limits, with as large a message as the cloud takes where that is more."""
    offered = min(info.limits.max_message_bytes, MAX_EDGE_MESSAGE_BYTES)
    return replace(own, max_message_bytes=max(own.max_message_bytes, offered))


@dataclass(frozen=True, slots=True)
class NeedSend:
    """The handshake goes on: send `frames`."""

    frames: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Established:
    """The session stands; messages may be sent. On the cloud, send `frames` first."""

    info: SessionInfo
    frames: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Received:
    """A whole message. Its tensors are views of `body`, which the receiver owns and may `wipe`."""

    message: Message
    body: bytearray = field(repr=False)
    frames: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Oversized:
    """(cloud) A whole message of more bytes than its tenant may have in flight: it was authenticated and dropped."""

    kind: type[Message]
    id: CallId | None  # the call that it names, where it names one
    size: int
    frames: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Incomplete:
    """The frame was good and the message is not complete, or it was a control frame."""

    frames: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """The cloud does not take this edge: send `frames`, which say why, and end the stream. The session is closed."""

    error: IsthmusError
    frames: tuple[bytes, ...]


Event = NeedSend | Established | Received | Oversized | Incomplete | Refused


class _Session:
    """What both sides share: the states, and sealed messages once the handshake is done.

    Attributes:
        info: what the cloud said about the session, once it stands.
        closed: whether the session is dead.
    """

    _sends: tuple[type[Message], ...]
    _takes: tuple[type[Message], ...]
    _exchange: ClientHandshake | ServerHandshake
    _renewal: EdgeRenewal | CloudRenewal | None = None

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self.info: SessionInfo | None = None
        self.closed = False
        self._limits = limits
        self._clock = clock
        self._sealer: Sealer | None = None
        self._opener: Opener | None = None
        self._reason = ""

    @property
    def established(self) -> bool:
        """Whether messages can be sent: the handshake is done and the session is not closed."""
        return self._sealer is not None and not self.closed

    def close(self) -> None:
        """End the session and overwrite its keys. May be called more than once."""
        self._close("it was closed by this side")

    def send(self, message: Message) -> Iterator[bytes]:
        """Seal a message; each frame is made when it is asked for, so that a large message streams.

        Take all the frames, and leave the message's buffers unchanged until then.

        Raises:
            LocalProtocolError: the session does not stand, the message is not one that this side sends, or it is
                malformed or too large.
        """
        sealer = self._sealer
        if self.closed or sealer is None:
            raise LocalProtocolError(f"{type(message).__name__} cannot be sent: the session is not open{self._why()}")
        if not isinstance(message, self._sends):
            raise LocalProtocolError(f"{type(message).__name__} is not a message that this side sends")
        header, body = pack(message)
        return self._renewing(sealer.seal(header, body))

    def _renewing(self, frames: Iterator[bytes]) -> Iterator[bytes]:
        """The frames of a message, behind that of a renewal which goes before it."""
        first = None if self._renewal is None else self._renewal.before_message()
        if first is not None:
            yield first
        yield from frames

    def rekey(self) -> bytes:
        """Change this side's key now; send the returned frame before any other. It also happens by itself."""
        if self.closed or self._sealer is None:
            raise LocalProtocolError(f"the key cannot be changed: the session is not open{self._why()}")
        return self._sealer.rekey()

    def receive(self, frame: Buffer) -> Event:
        """Take the next frame that arrived.

        Returns:
            What it means; send its `frames`.

        Raises:
            RemoteProtocolError: the other side broke the protocol, or the frame was changed on its way. The session
                is dead.
            VersionError: the other side's hello is of another version. The session is dead.
            FingerprintError: (edge) the server is not the pinned one, or cannot prove it. The session is dead.
            NotEnrolledError, RefusedError: (edge) the cloud refused. The session is dead.
            LocalProtocolError: the session is closed, or waits for this side.
        """
        if self.closed:
            raise LocalProtocolError(f"a frame cannot be received: the session is not open{self._why()}")
        try:
            if self._opener is None:
                return self._handshake(frame)
            opened = self._opener.open(frame)
            if opened is None:
                return Incomplete()
            if opened.size > len(opened.body):
                kind, call = peek(opened.header, self._limits)
                self._check_kind(kind)
                return Oversized(kind, call, opened.size)
            message = unpack(opened.header, opened.body, self._limits)
            self._check_kind(type(message))
            return Received(message, opened.body)
        except (RemoteProtocolError, VersionError, FingerprintError, NotEnrolledError, RefusedError) as error:
            self._close(str(error))
            raise

    def _check_kind(self, kind: type[Message]) -> None:
        if kind not in self._takes:
            raise MessageError(f"{kind.__name__} is not a message that the other side may send")

    def _handshake(self, frame: Buffer) -> Event:
        raise NotImplementedError

    def _close(self, reason: str) -> None:
        if not self.closed:
            self.closed, self._reason = True, reason
        for part in (self._sealer, self._opener, self._renewal, self._exchange):
            if part is not None:
                part.close()

    def _why(self) -> str:
        return f" ({self._reason})" if self._reason else ""


class EdgeSession(_Session):
    """The edge's side of a session.

    Args:
        pin: fingerprint of the cloud's root key.
        edge_key: who the edge is.
        limits: what it accepts and when it changes keys. The size of a message follows what the cloud says in the
            handshake: that is the most that is sent, and as much is accepted, if it is more than `limits` has but no
            more than `MAX_EDGE_MESSAGE_BYTES`.
        now: the wall clock in Unix seconds, for the certificate's expiry.
        random: a cryptographic source of bytes.
        clock: seconds that never go back, for the age of a key.
    """

    _sends = EDGE_SENDS
    _takes = CLOUD_SENDS
    _exchange: ClientHandshake

    def __init__(
        self,
        *,
        pin: Fingerprint,
        edge_key: Ed25519PrivateKey,
        limits: Limits = DEFAULT_LIMITS,
        now: Callable[[], float] = time.time,
        random: Callable[[int], bytes] = os.urandom,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(limits, clock)
        self._exchange = ClientHandshake(pin, edge_key, now, random)
        self._flights = 0

    def start(self) -> bytes:
        """Make the first frame, once."""
        if self.closed or self._flights:
            raise LocalProtocolError(f"a session starts once; open a new one{self._why()}")
        self._flights = 1
        return self._exchange.start()

    def expect(self, body_bytes: int | None) -> None:
        """Say how large the body of an answer may be, from the next message on: what was asked for, and no more.

        A message with a larger body is refused by the first frame's prefix, before anything is allocated for it.

        Args:
            body_bytes: bytes, 0 for an answer that has no tensors and no chunk of a file; None for all that the limits
                accept, as at the beginning.

        Raises:
            LocalProtocolError: the session does not stand.
        """
        if self.closed or self._opener is None:
            raise LocalProtocolError(f"nothing can be expected: the session is not open{self._why()}")
        self._opener.expect(body_bytes)

    def _handshake(self, frame: Buffer) -> Event:
        if self._flights == 0:
            raise LocalProtocolError(
                "a frame cannot be received before the session's first frame was made: call start()"
            )
        if self._flights == 1:
            reply = self._exchange.answer(frame)
            self._flights = 2
            return NeedSend((reply,))
        verdict, secrets = self._exchange.finish(frame)
        if secrets is None:
            raise _refusal(verdict)
        info = unpack_info(verdict.body)
        if info.session_id != verdict.session_id.hex():
            raise MessageError(
                f"the session's information names session {info.session_id}, not {verdict.session_id.hex()}"
            )
        self.info = info
        self._limits = edge_limits(info, self._limits)
        most = min(info.limits.max_message_bytes, self._limits.max_message_bytes)
        sending = replace(self._limits, max_message_bytes=most)
        session_id, up, down = verdict.session_id, Direction.EDGE_TO_CLOUD, Direction.CLOUD_TO_EDGE
        self._sealer = Sealer(secrets.edge_to_cloud, session_id, up, sending, self._clock)
        self._opener = Opener(secrets.cloud_to_edge, session_id, down, self._limits)
        self._renewal = EdgeRenewal(self._sealer, self._opener, session_id, self._limits, self._clock)
        return Established(info)


class CloudSession(_Session):
    """The cloud's side of a session.

    Args:
        identity: the worker's key and certificate.
        authorize: gives the tenant of a raw public key (32 bytes); raises NotEnrolledError or RefusedError, which the
            edge is told under the handshake's keys.
        info: gives what the edge is told of its session, from the tenant and the session's id (16 bytes); may raise as
            `authorize` does.
        limits: what it accepts and when it changes keys.
        random: a cryptographic source of bytes.
        clock: seconds that never go back, for the age of a key.

    Attributes:
        greeted: whether the edge's hello has come, and was a valid one.
        tenant: whose session it is, once it stands.
    """

    _sends = CLOUD_SENDS
    _takes = EDGE_SENDS
    _exchange: ServerHandshake

    def __init__(
        self,
        *,
        identity: WorkerIdentity,
        authorize: Callable[[bytes], Tenant],
        info: Callable[[Tenant, bytes], SessionInfo],
        limits: Limits = DEFAULT_LIMITS,
        random: Callable[[int], bytes] = os.urandom,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(limits, clock)
        self._exchange = ServerHandshake(identity, random)
        self._authorize = authorize
        self._describe = info
        self._random = random
        self.greeted = False
        self.tenant: Tenant | None = None

    def _handshake(self, frame: Buffer) -> Event:
        if not self.greeted:
            try:
                reply = self._exchange.answer(frame)
            except VersionError as error:
                self._close(str(error))
                return Refused(error, (version_refusal(),))
            self.greeted = True
            return NeedSend((reply,))
        edge = self._exchange.identify(frame)
        session_id = self._random(SESSION_ID_BYTES)
        try:
            tenant = self._authorize(edge)
            info = self._describe(tenant, session_id)
        except (NotEnrolledError, RefusedError) as error:
            return self._refuse(error)
        if info.session_id != session_id.hex():
            raise LocalProtocolError("the session's information must carry the given session id")
        reply, secrets = self._exchange.finish(Verdict(StatusCode.OK, session_id, pack_info(info)))
        if secrets is None:
            raise LocalProtocolError("an accepted handshake has no secrets")
        self.info, self.tenant = info, tenant
        up, down = Direction.EDGE_TO_CLOUD, Direction.CLOUD_TO_EDGE
        self._sealer = Sealer(secrets.cloud_to_edge, session_id, down, self._limits, self._clock)
        self._opener = Opener(secrets.edge_to_cloud, session_id, up, self._limits, tenant.quota.max_inflight_bytes)
        self._renewal = CloudRenewal(self._sealer, self._opener, session_id, self._limits, self._clock, self._random)
        return Established(info, (reply,))

    def _refuse(self, error: NotEnrolledError | RefusedError) -> Refused:
        code = next(code for kind, code in _REFUSALS if isinstance(error, kind))
        reply, _ = self._exchange.finish(Verdict(code, bytes(SESSION_ID_BYTES), cut(str(error)).encode()))
        self._close(str(error))
        return Refused(error, (reply,))


# What `authorize` may raise, and how the edge is told. The first fitting entry counts, so the general one comes last.
_REFUSALS: tuple[tuple[type[NotEnrolledError | RefusedError], StatusCode], ...] = (
    (NotEnrolledError, StatusCode.NOT_ENROLLED),
    (DrainingError, StatusCode.DRAINING),
    (OverQuotaError, StatusCode.OVER_QUOTA),
    (RefusedError, StatusCode.BAD_REQUEST),
)


def _refusal(verdict: Verdict) -> IsthmusError:
    """What the cloud's refusal means for the edge."""
    text = verdict.body[:MAX_TEXT].decode(errors="replace")
    kind = next((kind for kind, code in _REFUSALS if code == verdict.code), RefusedError)
    return kind(printable(text))
