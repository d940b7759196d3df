"""Frames: the prefix that they begin with, the gRPC message of each, the time that they may take, and their keys.

How frames are sealed with these keys is told in `isthmus.protocol.secure.record`; the flights of
`isthmus.protocol.secure.handshake` begin with the same magic, kind and version.

A gRPC message is a `Frame` of `isthmus.proto`. Protobuf would take 1.2 ms to write one of 1 MiB, most of it in fresh
pages for two copies more, where joining the same bytes takes 0.02 ms. So this file joins them, and takes nothing but
what protobuf would write.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from isthmus.common.errors import LocalProtocolError
from isthmus.protocol.limits import Buffer, TransferTimeout

MAGIC = b"ISTH"
VERSION = 13
TAG = 16
KEY_BYTES = 32

FLIGHT_PREFIX = struct.Struct("!4sBB")
"""Magic, kind and version: what a flight of the handshake begins with."""
PREFIX = struct.Struct("!4sBBIQIHHQ")
"""What a sealed frame begins with: magic "ISTH" | kind u8 | version u8 | epoch u32 | counter u64 | header bytes u32 |
chunk u16 | chunks u16 | body bytes u64. `counter` is that of the frame's first record. Sizes are those of the
plaintext; `header bytes` and `body bytes` are the whole message's and the same in all its frames."""
_PREFIX_FIELD, _SEALED_FIELD = 0x0A, 0x12  # numbers 1 and 2 of `Frame`, of bytes
_NONCE = struct.Struct("!IQ")
_ZEROS = memoryview(bytes(1 << 16))
MAX_CHUNKS = (1 << 16) - 1
MAX_CONTROLS = 16
"""Control frames in a row, without a message between. Two would do: an honest sender has no more before a message."""
PUBLIC_BYTES, SEALED_SECRET_BYTES = 1184 + 32, 1088 + 32 + KEY_BYTES + TAG
"""Of fresh ML-KEM-768 and X25519 keys, and of a secret that HPKE has sealed for them."""
MAX_EPOCH = (1 << 32) - 1
MAX_COUNTER = (1 << 64) - 1


class Direction(enum.IntEnum):
    """Who sends. Each direction has its own keys."""

    EDGE_TO_CLOUD = 1
    CLOUD_TO_EDGE = 2


class Kind(enum.IntEnum):
    """The kinds of frames; the handshake's flights come first."""

    CLIENT_HELLO = 1
    SERVER_HELLO = 2
    CLIENT_AUTH = 3
    SERVER_DONE = 4
    VERSION_REFUSED = 5
    DATA = 16
    REKEY = 17
    OFFER = 18
    ANSWER = 19
    SWITCH = 20


class ContentType(enum.IntEnum):
    """What a record holds. A record is what one AEAD operation seals."""

    HEADER = 1
    CHUNK = 2
    REKEY = 3
    OFFER = 4
    ANSWER = 5
    SWITCH = 6


@dataclass(frozen=True, slots=True)
class FreshSecret:
    """What a renewal of keys gives the next epoch of either direction: a secret, and the hash of how it came about."""

    secret: bytearray = field(repr=False)
    transcript: bytes


CONTROL_BYTES = {Kind.REKEY: 0, Kind.OFFER: PUBLIC_BYTES, Kind.ANSWER: SEALED_SECRET_BYTES, Kind.SWITCH: 0}
"""The frames that stand between messages, and the plaintext bytes of each."""


def wipe(*buffers: bytearray | memoryview) -> None:
    """Overwrite buffers that held keys or plaintext with zeros. A read-only view is refused with a TypeError."""
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        for start in range(0, len(view), len(_ZEROS)):
            part = view[start : start + len(_ZEROS)]
            part[:] = _ZEROS[: len(part)]


def chunk_count(body_bytes: int, chunk_bytes: int) -> int:
    """Count the frames of a message; an empty body takes one, too."""
    return max(1, -(-body_bytes // chunk_bytes))


def write_frame(frame: bytes) -> bytes:
    """Make the gRPC message of a frame."""
    prefix = frame[: _prefix_size(frame)]
    if not prefix:
        return b""
    start = bytes((_PREFIX_FIELD, len(prefix))) + prefix
    if len(frame) == len(prefix):
        return start
    return b"".join((start, _sealed_start(len(frame) - len(prefix)), memoryview(frame)[len(prefix) :]))


def read_frame(message: bytes) -> bytes:
    """Take the frame out of a gRPC message. What is no `Frame` gives no bytes, which a session refuses as no frame."""
    if len(message) < 2 or message[0] != _PREFIX_FIELD:
        return b""
    prefix, rest = message[2 : 2 + message[1]], memoryview(message)[2 + message[1] :]
    if not 0 < message[1] == len(prefix) <= _prefix_size(prefix):
        return b""
    if not rest:
        return prefix
    for width in range(2, min(6, len(rest))):  # of the second field's start: its number, and a length of 1 to 4 bytes
        if bytes(rest[:width]) == _sealed_start(len(rest) - width) and len(prefix) == _prefix_size(prefix):
            return b"".join((prefix, rest[width:]))
    return b""


def _prefix_size(frame: bytes) -> int:
    """Bytes of a frame that are in the clear, by its kind."""
    return PREFIX.size if frame[4:5] >= bytes((Kind.DATA,)) else FLIGHT_PREFIX.size


def _sealed_start(size: int) -> bytes:
    start = bytearray((_SEALED_FIELD,))
    while size > 127:
        start.append(size & 127 | 128)
        size >>= 7
    start.append(size)
    return bytes(start)


def seconds_left(timeout: TransferTimeout, passed: float, done: int) -> float:
    """Seconds until the next frame of a message is due, 0 where it is overdue.

    Args:
        timeout: how long the message may take.
        passed: seconds since it began.
        done: bytes of it that have come, or have been taken.
    """
    return max(0.0, min(timeout.message_seconds, timeout.stall_seconds + done / timeout.least_rate) - passed)


class KeyChain:
    """The chain of secrets of one direction: one epoch's key at a time."""

    def __init__(self, secret: bytearray, session_id: bytes, direction: Direction, clock: Callable[[], float]) -> None:
        if len(secret) != KEY_BYTES:
            raise LocalProtocolError(f"a traffic secret has {KEY_BYTES} bytes, not {len(secret)}")
        self._secret = secret
        self._clock = clock
        self._aad_start = session_id + bytes((direction,))
        self.counter = 0
        self.epoch = 0
        self.total = 0
        self._install()

    def _install(self) -> None:
        key = bytearray(KEY_BYTES)
        _expand(self._secret, b"isthmus traffic key", key)
        self._aead: AESGCM | None = AESGCM(key)
        wipe(key)
        self.bytes = 0
        self.records = 0
        self.since = self._clock()

    @property
    def aead(self) -> AESGCM:
        """The cipher under the epoch's key. Raises LocalProtocolError once the chain was wiped."""
        if self._aead is None:
            raise LocalProtocolError("the session is closed; open a new one")
        return self._aead

    def ratchet(self, fresh: FreshSecret | None = None) -> None:
        """Go to the next epoch, with what a renewal gives it where there is one; the old secret is overwritten."""
        following = bytearray(KEY_BYTES)
        if fresh is None:
            _expand(self._secret, b"isthmus next epoch", following)
        else:
            prk = bytearray(HKDF.extract(SHA256(), bytes(self._secret), fresh.secret))
            _expand(prk, b"isthmus renewed epoch" + fresh.transcript, following)
            wipe(prk)
        self._secret[:] = following
        wipe(following)
        self.epoch += 1
        self._install()

    def use(self, plain_bytes: int) -> bytes:
        """Take the nonce of the next record."""
        nonce = _NONCE.pack(self.epoch, self.counter)
        self.counter += 1
        self.records += 1
        self.bytes += plain_bytes
        self.total += plain_bytes
        return nonce

    def aad(self, content: ContentType, prefix: Buffer, header_hash: bytes = b"") -> bytes:
        """What is authenticated with a record: session, direction, content, the frame's prefix, the header's hash."""
        return b"".join((self._aad_start, bytes((content,)), prefix, header_hash))

    def wipe(self) -> None:
        """Overwrite the secret and drop the cipher; the library frees its copy of the key."""
        wipe(self._secret)
        self._aead = None


def _expand(secret: Buffer, info: bytes, into: bytearray) -> None:
    HKDFExpand(SHA256(), KEY_BYTES, info).derive_into(secret, into)
