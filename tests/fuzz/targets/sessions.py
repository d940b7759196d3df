"""Sessions: a handshake of which one side is hostile but holds its keys, and then messages that are sealed properly.

An input says which flight is hostile and what is in it. The other flights are honest, so that late checks are reached;
what is signed or sealed is so after it was changed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from fuzz.target import Cursor, Target, block, patched
from support.protocol.example_messages import MESSAGES
from support.protocol.wire import EDGE, NOW, ROOT, TENANT, WORKER, identity, new_cloud, new_edge, session_info

from isthmus.common.errors import (
    FingerprintError,
    NotEnrolledError,
    RefusedError,
    RemoteProtocolError,
    VersionError,
)
from isthmus.protocol import isthmus_pb2 as pb, messages as m, session
from isthmus.protocol.encoding import pack, pack_info, unpack_info
from isthmus.protocol.enrolment import Quota, Tenant
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import CLOUD_SENDS, EDGE_SENDS, SessionInfo
from isthmus.protocol.secure import handshake, renewal
from isthmus.protocol.secure.certificates import WorkerCertificate
from isthmus.protocol.secure.framing import SEALED_SECRET_BYTES, Direction, Kind
from isthmus.protocol.secure.handshake import (
    ClientHandshake,
    ServerHandshake,
    Verdict,
    fresh_keys,
    public_bytes,
)
from isthmus.protocol.session import (
    CloudSession,
    EdgeSession,
    Established,
    Incomplete,
    NeedSend,
    Oversized,
    Received,
    Refused,
)

REFUSALS = (RemoteProtocolError, VersionError, FingerprintError, NotEnrolledError, RefusedError)
LIMITS = Limits(
    max_message_bytes=1 << 16, max_header_bytes=1 << 12, chunk_bytes=1 << 10, renew_bytes=0, least_renew_bytes=0
)
OFFER = public_bytes(*fresh_keys())
SMALL = Tenant(TENANT.name, TENANT.fingerprint, Quota(max_inflight_bytes=1 << 10))
HELLO, SERVER_HELLO, AUTH, DONE, UPWARDS, DOWNWARDS, OFFERED, ANSWERED = range(8)
_CONTROLS = (Kind.OFFER, Kind.ANSWER, Kind.SWITCH)


def _random(count: int) -> bytes:
    return bytes(count)


def _run(data: bytes) -> None:
    script = Cursor(data)
    which = script.number() % 8
    edge = new_edge(limits=LIMITS, random=_random)
    cloud = new_cloud(limits=LIMITS, random=_random, authorize=lambda key: SMALL)
    try:
        (_hello, _server_hello, _auth, _done, _upwards, _downwards, _offered, _answered)[which](script, edge, cloud)
    except REFUSALS:
        if not (edge.closed or cloud.closed):
            raise AssertionError("no side is closed after a refusal") from None


def _hello(script: Cursor, _: EdgeSession, cloud: CloudSession) -> None:
    raw, patches = script.block(), script.block()
    event = cloud.receive(raw or patched(new_edge(random=_random).start(), patches))
    if not isinstance(event, NeedSend | Refused):
        raise AssertionError(f"a hello leads to {event}")


def _server_hello(script: Cursor, edge: EdgeSession, cloud: CloudSession) -> None:
    """The server's fields changed, and signed again by the worker; the certificate by the root."""
    flags, not_after, raw, patches = script.number(), script.number("Q"), script.block(), script.block()
    reply = cloud.receive(first := edge.start()).frames[0]
    if raw:
        edge.receive(raw)
        return
    prefix, fields = reply[:6], list(handshake._SERVER.unpack(reply[6:-64]))
    if flags & 1:
        certificate = WorkerCertificate.issue(ROOT, WORKER.public_key().public_bytes_raw(), not_after)
        fields[5:] = certificate.not_after, certificate.signature
    unsigned = patched(prefix + handshake._SERVER.pack(*fields), patches)
    signature = WORKER.sign(handshake._SERVER_LABEL + handshake.hash_parts(first, unsigned))
    answer = edge.receive(unsigned + (signature if flags & 2 else reply[-64:]))
    expired = flags & 1 and not_after <= NOW
    if not isinstance(answer, NeedSend) or expired:
        raise AssertionError("a hello was accepted that proves nothing")


def _auth(script: Cursor, edge: EdgeSession, cloud: CloudSession) -> None:
    """The edge's last flight, raw, or sealed with a key and a signature of its choice."""
    flags, raw, secret, plain, patches = (
        script.number(),
        script.block(),
        script.take(32).ljust(32, b"\0"),
        script.take(96).ljust(96, b"\0"),
        script.block(),
    )
    first = edge.start()
    reply = cloud.receive(first).frames[0]
    if raw:
        cloud.receive(raw)
    elif flags & 1:
        cloud.receive(patched(edge.receive(reply).frames[0], patches))
    else:
        event = cloud.receive(_forged(first, reply, secret[: 32 - (flags >> 1) % 33], plain, bool(flags & 128)))
        if not isinstance(event, Established):
            raise AssertionError(f"the edge's last flight leads to {event}")


def _forged(first: bytes, reply: bytes, secret: bytes, plain: bytes, signed: bool) -> bytes:
    """A CLIENT_AUTH that seals what it likes."""
    fields = handshake._SERVER.unpack(reply[6:-64])
    fresh = handshake.MLKEM768X25519PublicKey(
        handshake.MLKEM768PublicKey.from_public_bytes(fields[1]),
        handshake.X25519PublicKey.from_public_bytes(fields[2]),
    )
    sealed = handshake._HPKE.encrypt(secret, fresh, handshake.hash_parts(first, reply[:-64]))
    th2 = handshake.hash_parts(first, reply, sealed)
    if signed:
        public = EDGE.public_key().public_bytes_raw()
        plain = public + EDGE.sign(handshake._EDGE_LABEL + th2 + public)
    schedule = handshake._Schedule(th2, secret)
    return handshake._flight(handshake.Kind.CLIENT_AUTH, sealed + schedule.seal(Direction.EDGE_TO_CLOUD, plain))


def _done(script: Cursor, edge: EdgeSession, _: CloudSession) -> None:
    """The cloud's last word, sealed: a code, a session's id, and what it says of itself."""
    code, patches, raw, body = script.number(), script.block(), script.block(), script.rest()
    server = ServerHandshake(identity(), _random)
    server.identify(edge.receive(server.answer(edge.start())).frames[0])
    flight, _ = server.finish(Verdict(code, bytes(16), body[: 1 << 14]))
    event = edge.receive(raw or patched(flight, patches))
    if not isinstance(event, Established) or code:
        raise AssertionError(f"the cloud's last flight leads to {event}")
    _check(event.info)


def _check(info: SessionInfo) -> None:
    if unpack_info(pack_info(info)) != info:
        raise AssertionError("the session's information is another one when it is read again")
    for text in (info.digest, info.session_id, info.plan.replace(":", "")):
        if not text.isalnum() or not text.isascii():
            raise AssertionError(f"{text!r} is no safe part of a file's name")
    most = session.edge_limits(info, LIMITS).max_message_bytes
    if not LIMITS.max_message_bytes <= most <= session.MAX_EDGE_MESSAGE_BYTES:
        raise AssertionError(f"the cloud makes the edge take {most} bytes")


def _established(edge: EdgeSession, cloud: CloudSession) -> None:
    first = cloud.receive(edge.start())
    second = cloud.receive(edge.receive(first.frames[0]).frames[0])
    edge.receive(second.frames[0])


def _upwards(script: Cursor, edge: EdgeSession, cloud: CloudSession) -> None:
    _established(edge, cloud)
    _deliver(script, edge, cloud, EDGE_SENDS)


def _downwards(script: Cursor, edge: EdgeSession, cloud: CloudSession) -> None:
    _established(edge, cloud)
    _deliver(script, cloud, edge, CLOUD_SENDS)


def _deliver(script: Cursor, sender: Any, receiver: Any, kinds: tuple[type, ...]) -> None:
    """Seal any header and body, and open them."""
    header, body = script.block()[: LIMITS.max_header_bytes] or b"\0", script.rest()
    for frame in sender._sealer.seal(header, [body]):
        event = receiver.receive(frame)
        match event:
            case Received(message):
                if not isinstance(message, kinds):
                    raise AssertionError(f"{type(message).__name__} was taken from the side that may not send it")
            case Oversized(kind, _, size):
                if kind not in kinds or size != len(body) or size <= SMALL.quota.max_inflight_bytes:
                    raise AssertionError(f"a message of {size} bytes is said to be {kind} and too large")


def _offered(script: Cursor, edge: Any, cloud: Any) -> None:
    """Any offer of fresh keys, or another part of a renewal in its place, sealed; a good one leads to an answer."""
    _established(edge, cloud)
    kind, raw, patches = _CONTROLS[script.number() % 3], script.block(), script.block()
    offer = raw or patched(OFFER, patches)
    cloud.receive(edge._sealer.control(kind, offer))
    (answer, pong) = cloud.send(m.Pong(1, 2))
    if kind != Kind.OFFER or (answer[4], len(offer)) != (Kind.ANSWER, len(OFFER)) or pong[4] != Kind.DATA:
        raise AssertionError("an offer that is none was answered")


def _answered(script: Cursor, edge: Any, cloud: Any) -> None:
    """Any answer to an offer, or another part of a renewal in its place, sealed; a good one leads to the switch."""
    _established(edge, cloud)
    for frame in edge.send(m.Ping(1)):
        cloud.receive(frame)
    kind, raw, patches = _CONTROLS[script.number() % 3], script.block(), script.block()
    answer = raw or patched(cloud._renewal._answer, patches)
    edge.receive(cloud._sealer.control(kind, answer, cloud._renewal._fresh))
    cloud._renewal._answer, taken = None, answer
    for frame in edge.send(m.Ping(1)):
        if not isinstance(cloud.receive(frame), Received | Incomplete) or len(taken) != SEALED_SECRET_BYTES:
            raise AssertionError("an answer that is none was taken")


def info_with(**changes: Any) -> bytes:
    """A session's information with other values, whatever they are; without those that are None."""
    parsed = pb.SessionInfo.FromString(pack_info(session_info(TENANT, bytes(16))))
    for name, value in changes.items():
        parsed.ClearField(name)
        if value is not None:
            parsed.MergeFrom(pb.SessionInfo(**{name: value}))
    return bytes(parsed.SerializeToString(deterministic=True))


def _seeds() -> Iterator[bytes]:
    yield bytes((HELLO,)) + block(b"") + block(b"")
    yield bytes((HELLO,)) + block(new_edge(random=_random).start()[:-1])
    yield bytes((HELLO,)) + block(b"") + block(struct.pack("<hB", 5, 9))  # another version
    yield bytes((HELLO,)) + block(b"") + block(struct.pack("<hB", 7, 9))  # another suite
    for flags in range(4):
        for not_after in (NOW + 1, NOW, (1 << 64) - 1):
            yield bytes((SERVER_HELLO, flags)) + struct.pack("<Q", not_after) + block(b"") + block(b"")
        yield bytes((SERVER_HELLO, flags)) + bytes(8) + block(b"") + block(struct.pack("<hB", 60, 9))
    yield bytes((SERVER_HELLO, 0)) + bytes(8) + block(b"ISTH\5\6")
    yield bytes((AUTH, 1)) + block(b"") + bytes(128) + block(b"")
    yield bytes((AUTH, 1)) + block(b"") + bytes(128) + block(struct.pack("<hB", -1, 9))
    for flags in (0, 2, 64, 128):
        yield bytes((AUTH, flags)) + block(b"") + bytes(range(128)) + block(b"")
    yield bytes((AUTH, 0)) + block(b"ISTH\3\6")
    wrong = ({"plan": "1"}, {"codecs": ["\n"]}, {"limits": None}, {"session_id": "0" * 31}, {"session_id": "1" * 32})
    for body in (info_with(), *(info_with(**changes) for changes in wrong), b"[]", b""):
        yield bytes((DONE, 0)) + block(b"") + block(b"") + body
    for code in (1, 4, 8, 77):
        yield bytes((DONE, code)) + block(b"") + block(b"") + b"not today \x1b[2J\xff"
    yield bytes((DONE, 0)) + block(struct.pack("<hB", -1, 9)) + block(b"")
    yield bytes((DONE, 0)) + block(b"") + block(bytes(300))
    for message in MESSAGES:
        header, buffers = pack(message)
        which = UPWARDS if isinstance(message, EDGE_SENDS) else DOWNWARDS
        yield bytes((which,)) + block(header) + b"".join(buffers)
    for which in (OFFERED, ANSWERED):
        yield bytes((which, 0)) + block(b"") + block(b"")
        yield bytes((which, 1)) + block(b"") + block(b"")
        yield bytes((which, 1)) + block(b"") + block(struct.pack("<hB", 9, 1))
        yield bytes((which, 1)) + block(b"") + block(struct.pack("<hB", -1, 1))
        yield bytes((which, which == ANSWERED)) + block(bytes(SEALED_SECRET_BYTES)) + block(b"")
        yield bytes((which, 2)) + block(b"") + block(b"")
        yield bytes((which, 0)) + block(b"\xff" * len(OFFER)) + block(b"")
    large, _ = pack(MESSAGES[0])
    yield bytes((UPWARDS,)) + block(large) + bytes(1500)
    yield bytes((UPWARDS,)) + block(b"\x02") + bytes(1500)


TARGET = Target(
    _run,
    _seeds,
    [
        ClientHandshake,
        ServerHandshake,
        handshake._Schedule,
        handshake._body,
        EdgeSession,
        CloudSession,
        session._Session,
        renewal,
        unpack_info,
    ],
    floor=0.8,
    max_len=4096,
    words=[b"ISTH", b"1:1", b"\x0a\x20", b"\x1a\x40", b"\x5a\x08"],
)
