"""Frames: what arrives at an opener, changed on its way, or sealed properly by a peer that lies in its prefix.

An input is a script: each step sends a message, some of it changed, or a frame of the peer's own making under the
session's real key, so that what comes behind authentication is reached too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from hashlib import sha256

from fuzz.target import Cursor, Target, block, patched

from isthmus.common.errors import FrameError, LimitError, LocalProtocolError
from isthmus.protocol.limits import Limits
from isthmus.protocol.secure.framing import (
    CONTROL_BYTES,
    MAGIC,
    PREFIX,
    VERSION,
    ContentType,
    Direction,
    FreshSecret,
    KeyChain,
    Kind,
)
from isthmus.protocol.secure.record import Opened, Opener, Sealer

LIMITS = Limits(max_message_bytes=1 << 12, max_header_bytes=256, chunk_bytes=64)
KEEP = 1 << 10
SECRET, SESSION, UP = bytes(range(32)), bytes(16), Direction.EDGE_TO_CLOUD
_SEND, _REKEY, _RAW, _FORGE = range(4)
_STEPS = 16


def _run(data: bytes) -> None:
    script = Cursor(data)
    sealer = Sealer(bytearray(SECRET), SESSION, UP, LIMITS, clock=lambda: 0.0)
    opener = Opener(bytearray(SECRET), SESSION, UP, LIMITS, keep=KEEP)
    opener.on_control = lambda kind, plain, keys: keys.ratchet(FreshSecret(bytearray(32), plain[:32]))
    way = _Way(sealer, opener)
    forged = False
    try:
        for _ in range(_STEPS):
            if not script:
                break
            match script.number() % 4:
                case 0 if not forged:
                    way.send(script)
                case 1 if not forged:
                    way.deliver(sealer.rekey(), script.block())
                case 2:
                    way.open(script.block())
                case 3:
                    forged = True  # from here on the counters of the sealer are not the opener's
                    way.forge(script)
    except (FrameError, LimitError):
        for frame in (b"", bytes(64)):
            try:
                opener.open(frame)
            except LocalProtocolError:
                continue
            raise AssertionError("an opener goes on after it has refused a frame") from None


class _Way:
    """The way from a sealer to its opener."""

    def __init__(self, sealer: Sealer, opener: Opener) -> None:
        self._sealer = sealer
        self._opener = opener

    def send(self, script: Cursor) -> None:
        """Seal a message; each of its frames may be changed."""
        header, body, patches = script.block()[:256] or b"h", script.block()[: 1 << 12], script.block()
        opened = None
        for frame in self._sealer.seal(header, [body]):
            opened = self.deliver(frame, patches)
            patches = b""
        if opened is None:
            raise AssertionError("a whole message was not given away")
        kept = body if len(body) <= KEEP else b""
        if (opened.header, opened.body, opened.size) != (header, kept, len(body)):
            raise AssertionError("another message was opened than was sealed")

    def deliver(self, frame: bytes, patches: bytes) -> Opened | None:
        """Hand a frame of the sealer's to the opener; a changed one must be refused."""
        changed = patched(frame, patches)
        opened = self.open(changed)
        if changed != frame:
            raise AssertionError("a changed frame was opened")
        return opened

    def open(self, frame: bytes) -> Opened | None:
        """Hand any frame to the opener; what it gives away is within the limits."""
        opened = self._opener.open(frame)
        if opened is not None and (len(opened.body) > KEEP or len(opened.header) > LIMITS.max_header_bytes):
            raise AssertionError("an opener keeps more than its limits")
        return opened

    def forge(self, script: Cursor) -> None:
        """Seal a frame with a prefix of the peer's choice, under the key and counter that the opener waits for."""
        keys = KeyChain(bytearray(SECRET), SESSION, UP, lambda: 0.0)
        for _ in range(self._opener._keys.epoch):
            keys.ratchet()
        keys.counter = self._opener._keys.counter
        kind = (Kind.DATA, *CONTROL_BYTES)[script.number() % 5]
        chunk, chunks, total = script.number("H"), script.number("H"), script.number("Q")
        claimed, header, body = script.number("I"), script.block(), script.block()
        prefix = PREFIX.pack(MAGIC, kind, VERSION, keys.epoch, keys.counter, claimed, chunk, chunks, total)
        frame = prefix
        if header or kind != Kind.DATA:
            content = ContentType.HEADER if kind == Kind.DATA else ContentType[kind.name]
            frame += keys.aead.encrypt(keys.use(len(header)), header, keys.aad(content, prefix))
        if body:
            message = self._opener._message
            known = message.header_hash if message is not None else sha256(header).digest()
            frame += keys.aead.encrypt(keys.use(len(body)), body, keys.aad(ContentType.CHUNK, prefix, known))
        self.open(frame)


def _send(header: bytes, body: bytes, patches: bytes = b"") -> bytes:
    return bytes((_SEND,)) + block(header) + block(body) + block(patches)


def _forge(kind: int, chunk: int, chunks: int, total: int, claimed: int, header: bytes, body: bytes) -> bytes:
    return bytes((_FORGE, kind)) + struct.pack("<HHQI", chunk, chunks, total, claimed) + block(header) + block(body)


def _seeds() -> Iterator[bytes]:
    yield _send(b"header", b"") + _send(b"header", bytes(200))
    yield _send(b"header", bytes(100)) + bytes((_REKEY,)) + block(b"") + _send(b"h", b"body")
    yield _send(b"header", bytes(1500))  # more than is kept
    yield _send(b"header", b"body", struct.pack("<hB", -1, 1))
    yield bytes((_RAW,)) + block(PREFIX.pack(MAGIC, Kind.DATA, VERSION, 0, 0, 4, 0, 1, 4) + bytes(40))
    yield _forge(0, 0, 1, 4, 6, b"header", b"body")
    yield _forge(0, 0, 2, 100, 6, b"header", bytes(64)) + _forge(0, 1, 2, 100, 6, b"", bytes(36))
    yield _forge(0, 0, 2, 100, 6, b"header", bytes(64)) + _forge(1, 0, 1, 0, 0, b"", b"")
    for kind, size in enumerate(CONTROL_BYTES.values(), 1):
        yield _forge(kind, 0, 1, size, 0, bytes(size), b"")
    yield _forge(1, 0, 1, 0, 0, b"", b"") + _forge(0, 0, 1, 1 << 40, 6, b"header", b"body")


TARGET = Target(_run, _seeds, [Opener, KeyChain], floor=0.9, max_len=4096, words=[MAGIC])
