"""Frames: the plaintext prefix that every frame begins with, and the chain of keys behind one direction of a session.

How frames are sealed with them is told in `isthmus.protocol.secure.record`; the flights of
`isthmus.protocol.secure.handshake` begin with the same magic, kind and version.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from isthmus.common.errors import LocalProtocolError
from isthmus.protocol.limits import Buffer

MAGIC = b"ISTH"
VERSION = 6
TAG = 16
KEY_BYTES = 32

FLIGHT_PREFIX = struct.Struct("!4sBB")
"""Magic, kind and version: what a flight of the handshake begins with."""
PREFIX = struct.Struct("!4sBBIQIHHQ")
"""What a sealed frame begins with, see `isthmus.protocol.secure.record`."""
_NONCE = struct.Struct("!IQ")
_ZEROS = memoryview(bytes(1 << 16))
MAX_CHUNKS = (1 << 16) - 1
MAX_REKEYS = 16
"""Key changes in a row, without a message between. One would do, as a sender has one before a message at most."""
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


class Piece(enum.IntEnum):
    """What one AEAD operation seals."""

    HEADER = 1
    CHUNK = 2
    REKEY = 3


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
        self._install()

    def _install(self) -> None:
        key = bytearray(KEY_BYTES)
        _expand(self._secret, b"isthmus traffic key", key)
        self._aead: AESGCM | None = AESGCM(key)
        wipe(key)
        self.bytes = 0
        self.pieces = 0
        self.since = self._clock()

    @property
    def aead(self) -> AESGCM:
        """The cipher under the epoch's key. Raises LocalProtocolError once the chain was wiped."""
        if self._aead is None:
            raise LocalProtocolError("the session is closed; open a new one")
        return self._aead

    def ratchet(self) -> None:
        """Go to the next epoch; the old secret is overwritten."""
        following = bytearray(KEY_BYTES)
        _expand(self._secret, b"isthmus next epoch", following)
        self._secret[:] = following
        wipe(following)
        self.epoch += 1
        self._install()

    def use(self, plain_bytes: int) -> bytes:
        """Take the nonce of the next piece."""
        nonce = _NONCE.pack(self.epoch, self.counter)
        self.counter += 1
        self.pieces += 1
        self.bytes += plain_bytes
        return nonce

    def aad(self, piece: Piece, prefix: Buffer, header_hash: bytes = b"") -> bytes:
        """What is authenticated with a piece: session, direction, what it is, the frame's prefix, the header's hash."""
        return b"".join((self._aad_start, bytes((piece,)), prefix, header_hash))

    def wipe(self) -> None:
        """Overwrite the secret and drop the cipher; the library frees its copy of the key."""
        wipe(self._secret)
        self._aead = None


def _expand(secret: Buffer, info: bytes, into: bytearray) -> None:
    HKDFExpand(SHA256(), KEY_BYTES, info).derive_into(secret, into)
