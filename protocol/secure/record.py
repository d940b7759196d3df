"""Sealing: messages to encrypted frames and back, in one direction of one session.

Rules
    1. A record is what AES-256-GCM seals in one operation: a header, a chunk of a body, or what a control frame
       carries. Its key belongs to one session, one direction and one epoch, and its nonce is never used twice: epoch
       (32 bits) then counter (64 bits). The counter grows by one with every record and never restarts, not even with a
       new epoch.
    2. The opener knows which counter, epoch, chunk and length must come next and takes nothing else: what is replayed,
       reordered, dropped, reflected, cut, extended, or of another session is refused.
    3. Sizes are compared with the limits before anything is allocated for them. A body of more bytes than are kept is
       authenticated chunk by chunk, as any other, and nothing is allocated for the whole of it.
       The side that asks says how much it has asked for (`expect`), and no message with more is begun.
    4. At most `MAX_CONTROLS` control frames stand between two messages. An honest sender has two at most, one of a
       renewal and a rekey, unless it is told to rekey.
    5. A key has a lifetime, in records and bytes: a sender changes it before a message once it has reached it, and a
       receiver takes one largest message more and nothing beyond.
    6. A message is given away only when all its chunks have been authenticated. `decrypt_into` leaves unauthenticated
       plaintext behind when it refuses; so on any failure the message's buffer is overwritten with zeros, and the
       opener is dead.

Theory of operation
    A message is a header and a body. The body is cut into chunks of `Limits.chunk_bytes`; each chunk is one frame,
    and the first frame also carries the header:

        prefix | sealed header (first frame only) | sealed chunk (absent if the body is empty)

    A first frame with a chunk has two records. Authenticated with every record: session id, direction, the prefix
    (see `isthmus.protocol.secure.framing`), what the record is (header, chunk or a kind of control frame), and for a
    chunk the SHA-256 of the header: so step, call, attempt, operation, codec and shape are bound to every byte of the
    body.

    Control frames stand between messages. A rekey frame seals nothing under the old key and announces the next epoch,
    whose secret is HKDF(old secret). Old secrets are overwritten, so that who takes a key later cannot read what went
    before. The other control frames belong to a renewal of keys, and are given to whoever has set `on_control`: see
    `isthmus.protocol.secure.renewal`. After `MAX_CONTROLS` control frames in a row, of any kind, a message must
    come, so that a session cannot be kept busy with nothing.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from cryptography.exceptions import InvalidTag

from isthmus.common.errors import FrameError, LimitError, LocalProtocolError
from isthmus.protocol.limits import DEFAULT_LIMITS, Buffer, Limits
from isthmus.protocol.secure.framing import (
    CONTROL_BYTES,
    MAGIC,
    MAX_CHUNKS,
    MAX_CONTROLS,
    MAX_COUNTER,
    MAX_EPOCH,
    PREFIX,
    TAG,
    VERSION,
    ContentType,
    Direction,
    FreshSecret,
    KeyChain,
    Kind,
    chunk_count,
    wipe,
)


@dataclass(frozen=True, slots=True)
class Opened:
    """A whole message: its header, and its body in a buffer that the receiver owns (and may `wipe`).

    `size`: bytes that the body has; one of more than the opener keeps was authenticated and dropped, and is empty here.
    """

    header: bytearray
    body: bytearray
    size: int


class Sealer:
    """Seals the messages of one direction. Not for two threads at once.

    Args:
        secret: 32 bytes; the sealer owns and overwrites them.
        session_id: 16 bytes, the same on both sides.
        direction: who sends.
        limits: chunk size, and when to change keys.
        clock: seconds that never go back, for the age of a key.
    """

    def __init__(
        self,
        secret: bytearray,
        session_id: bytes,
        direction: Direction,
        limits: Limits = DEFAULT_LIMITS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._keys = KeyChain(secret, session_id, direction, clock)
        self._scratch = bytearray()
        self._busy = False
        self._dead = False

    def close(self) -> None:
        """Overwrite the secrets. Every later call raises LocalProtocolError."""
        self._dead = True
        self._keys.wipe()

    def seal(self, header: Buffer, body: Sequence[Buffer]) -> Iterator[bytes]:
        """Seal a message, frame by frame, as the frames are asked for; a rekey frame comes first when it is time.

        The body's buffers are read when their frame is made: leave them unchanged until the iterator is done. The
        iterator must be run to its end before the next message.

        Raises:
            LocalProtocolError: the message is too large, the sealer is closed, or another message is not done yet.
        """
        parts = [memoryview(part).cast("B") for part in body if len(part)]
        total = sum(len(part) for part in parts)
        chunks = chunk_count(total, self._limits.chunk_bytes)
        if total > self._limits.max_message_bytes or chunks > MAX_CHUNKS:
            raise LocalProtocolError(
                f"a message body of {total} bytes is too large: {self._limits.max_message_bytes} may be sent; "
                "use a smaller batch"
            )
        if not 0 < len(header) <= self._limits.max_header_bytes:
            raise LocalProtocolError(
                f"a message header of {len(header)} bytes does not fit {self._limits.max_header_bytes}"
            )
        self._claim()
        return self._frames(header, parts, total, chunks)

    def rekey(self) -> bytes:
        """Change the key now; send the returned frame before any other."""
        self._claim()
        self._busy = False
        return self.control(Kind.REKEY)

    def control(self, kind: Kind, plain: bytes = b"", fresh: FreshSecret | None = None) -> bytes:
        """Seal a frame that stands between messages; behind all but an offer, the direction is in its next epoch.

        Args:
            kind: one of `CONTROL_BYTES`.
            plain: what it carries.
            fresh: what a renewal gives the next epoch.
        """
        keys = self._keys
        if keys.epoch >= MAX_EPOCH or keys.counter >= MAX_COUNTER - 4 * MAX_CHUNKS:
            raise LocalProtocolError("the session has used up its counters; open a new one")
        prefix = PREFIX.pack(MAGIC, kind, VERSION, keys.epoch, keys.counter, 0, 0, 1, len(plain))
        frame = prefix + keys.aead.encrypt(keys.use(len(plain)), plain, keys.aad(ContentType[kind.name], prefix))
        if kind != Kind.OFFER:
            keys.ratchet(fresh)
        return frame

    @property
    def total(self) -> int:
        """Bytes that were sealed so far."""
        return self._keys.total

    def _claim(self) -> None:
        if self._dead:
            raise LocalProtocolError("the session is closed; open a new one")
        if self._busy:
            raise LocalProtocolError(
                "the frames of the last message were not all taken; take them before the next message"
            )
        self._busy = True

    def _frames(self, header: Buffer, parts: list[memoryview], total: int, count: int) -> Iterator[bytes]:
        keys, header_hash = self._keys, sha256(header).digest()
        if self._is_rekey_due():
            yield self.control(Kind.REKEY)
        chunks = _cut(parts, self._limits.chunk_bytes, self._scratch)
        for index in range(count):
            if self._dead:
                raise LocalProtocolError("the session was closed while a message was being sent")
            sizes = (len(header), index, count, total)
            prefix = PREFIX.pack(MAGIC, Kind.DATA, VERSION, keys.epoch, keys.counter, *sizes)
            frame = self._frame(prefix, header if index == 0 else b"", next(chunks, None), header_hash)
            if index + 1 == count:
                chunks.close()
                self._busy = False
            yield frame

    def _frame(self, prefix: bytes, header: Buffer, chunk: memoryview | None, header_hash: bytes) -> bytes:
        """A prefix, and behind it a sealed header, unless it is empty, and a sealed chunk, unless it is None."""
        keys = self._keys
        behind = PREFIX.size + (len(header) + TAG if len(header) else 0)
        size = behind + (0 if chunk is None else len(chunk) + TAG)
        # BytesIO gives its buffer away as `bytes` without a copy, which is what gRPC takes.
        frame = io.BytesIO(bytes(size))
        with frame.getbuffer() as view:
            view[: PREFIX.size] = prefix
            if len(header):
                aad = keys.aad(ContentType.HEADER, prefix)
                keys.aead.encrypt_into(keys.use(len(header)), header, aad, view[PREFIX.size : behind])
            if chunk is not None:
                aad = keys.aad(ContentType.CHUNK, prefix, header_hash)
                keys.aead.encrypt_into(keys.use(len(chunk)), chunk, aad, view[behind:])
        return frame.getvalue()

    def _is_rekey_due(self) -> bool:
        keys, limits = self._keys, self._limits
        return (
            keys.bytes >= limits.rekey_bytes
            or keys.records >= limits.rekey_frames
            or (keys.records > 0 and self._clock() - keys.since >= limits.rekey_seconds)
        )


def _cut(parts: list[memoryview], size: int, scratch: bytearray) -> Generator[memoryview]:
    """Cut consecutive buffers into chunks of `size` bytes (the last may be shorter).

    A chunk that lies within one buffer is a view of it. One that crosses a border is gathered in `scratch`, which is
    wiped when the next chunk is asked for: a fresh buffer would cost several times the copy, in page faults.
    """
    pending: list[memoryview] = []
    missing = size
    for part in parts:
        left = part
        while len(left):
            pending.append(left[:missing])
            left = left[missing:]
            missing -= len(pending[-1])
            if missing == 0:
                yield from _gather(pending, scratch)
                pending, missing = [], size
    if pending:
        yield from _gather(pending, scratch)


def _gather(parts: list[memoryview], scratch: bytearray) -> Generator[memoryview]:
    if len(parts) == 1:
        yield parts[0]
        return
    total = sum(len(part) for part in parts)
    if len(scratch) < total:
        scratch.extend(bytes(total - len(scratch)))
    with memoryview(scratch) as whole:
        at = 0
        for part in parts:
            whole[at : at + len(part)] = part
            at += len(part)
        with whole[:total] as gathered:
            try:
                yield gathered
            finally:
                wipe(gathered)


class Opener:
    """Opens the frames of one direction. Not for two threads at once.

    Args:
        secret: 32 bytes; the opener owns and overwrites them.
        session_id: 16 bytes, the same on both sides.
        direction: who sends.
        limits: what is accepted.
        keep: the most bytes of a body that are kept; None for all that is accepted.

    Attributes:
        on_control: is given what an authentic control frame but a rekey carries, and the keys, which it may change.
    """

    def __init__(
        self,
        secret: bytearray,
        session_id: bytes,
        direction: Direction,
        limits: Limits = DEFAULT_LIMITS,
        keep: int | None = None,
    ) -> None:
        self._limits = limits
        self._keep = limits.max_message_bytes if keep is None else keep
        self._keys = KeyChain(secret, session_id, direction, clock=lambda: 0.0)
        self._dead = False
        self._controls = 0  # since the last message
        self.on_control: Callable[[Kind, bytes, KeyChain], None] = _refuse_control
        self._message: _Partial | None = None
        self._expected: int | None = None

    @property
    def total(self) -> int:
        """Bytes that were opened so far."""
        return self._keys.total

    def expect(self, body_bytes: int | None) -> None:
        """Refuse larger bodies than this from the next message on; None for all that the limits accept."""
        self._expected = body_bytes

    def close(self) -> None:
        """Overwrite the secrets and an unfinished message. Every later call raises LocalProtocolError."""
        self._dead = True
        self._keys.wipe()
        message, self._message = self._message, None
        if message is not None:
            # Of a body that never came whole, what never came is not written to: that would make it take memory.
            with memoryview(message.body) as body:
                wipe(message.header, body[: message.chunk * self._limits.chunk_bytes])

    def open(self, frame: Buffer) -> Opened | None:
        """Open the next frame.

        Returns:
            The message that this frame completes, or None.

        Raises:
            FrameError: the frame is not the one that must come next, or not authentic.
            LimitError: the message is over a limit.
            LocalProtocolError: the opener is dead.
        """
        if self._dead:
            raise LocalProtocolError("the session is closed; open a new one")
        try:
            return self._open(memoryview(frame))
        except (FrameError, LimitError):
            self.close()
            raise

    def _open(self, frame: memoryview) -> Opened | None:
        if len(frame) < PREFIX.size + TAG:
            raise FrameError(f"a frame of {len(frame)} bytes is too short")
        prefix = bytes(frame[: PREFIX.size])
        magic, kind, version, epoch, counter, header_bytes, chunk, chunks, total = PREFIX.unpack(prefix)
        if magic != MAGIC or (kind != Kind.DATA and kind not in CONTROL_BYTES):
            raise FrameError("a frame does not begin as one")
        if version != VERSION:
            # Not a VersionError: the handshake has agreed on the version, and this byte is not authenticated yet.
            raise FrameError(f"a frame of version {version} came; this session speaks version {VERSION}")
        keys = self._keys
        if (epoch, counter) != (keys.epoch, keys.counter):
            raise FrameError(
                f"frame {epoch}/{counter} came where {keys.epoch}/{keys.counter} was next (replayed, lost, reordered?)"
            )
        if kind != Kind.DATA:
            self._open_control(Kind(kind), frame, prefix, (header_bytes, chunk, chunks, total))
            return None
        message = self._message
        if message is None:
            message = self._check_start(header_bytes, chunk, chunks, total)
        elif (header_bytes, chunk, chunks, total) != message.next_sizes:
            raise FrameError(
                f"chunk {chunk} of {chunks} came where {message.chunk} of {message.chunks} of a message was next"
            )
        size = min(self._limits.chunk_bytes, total - chunk * self._limits.chunk_bytes)
        first = header_bytes + TAG if chunk == 0 else 0
        expected = PREFIX.size + first + (size + TAG if size else 0)
        if len(frame) != expected:
            raise FrameError(f"a frame has {len(frame)} bytes where {expected} are due")
        if self._message is None:
            # Nothing of the size that the peer claims is allocated before its first record is authentic.
            message.header = bytearray(header_bytes)
            sealed = frame[PREFIX.size : PREFIX.size + first]
            self._decrypt(sealed, keys.aad(ContentType.HEADER, prefix), memoryview(message.header))
            message.header_hash = sha256(message.header).digest()
            message.body = bytearray(total if total <= self._keep else 0)
            self._message, self._controls = message, 0
        if size:
            start = chunk * self._limits.chunk_bytes if message.body else 0
            aad = keys.aad(ContentType.CHUNK, prefix, message.header_hash)
            with memoryview(message.body or bytearray(size)) as room:
                self._decrypt(frame[PREFIX.size + first :], aad, room[start : start + size])
                if not message.body:
                    wipe(room)
        message.chunk += 1
        if message.chunk < message.chunks:
            return None
        self._message = None
        return Opened(message.header, message.body, total)

    def _open_control(self, kind: Kind, frame: memoryview, prefix: bytes, rest: tuple[int, int, int, int]) -> None:
        size = CONTROL_BYTES[kind]
        if self._message is not None:
            raise FrameError("a control frame came within a message")
        if self._controls >= MAX_CONTROLS:
            raise FrameError(f"more than {MAX_CONTROLS} control frames came without a message between them")
        if rest != (0, 0, 1, size) or len(frame) != PREFIX.size + size + TAG or self._keys.epoch >= MAX_EPOCH:
            raise FrameError("a control frame is malformed")
        plain = bytearray(size)
        self._decrypt(frame[PREFIX.size :], self._keys.aad(ContentType[kind.name], prefix), memoryview(plain))
        self._controls += 1
        if kind == Kind.REKEY:
            self._keys.ratchet()
        else:
            self.on_control(kind, bytes(plain), self._keys)

    def _check_start(self, header_bytes: int, chunk: int, chunks: int, total: int) -> _Partial:
        limits = self._limits
        if total > limits.max_message_bytes:
            raise LimitError(f"a message body of {total} bytes is refused: {limits.max_message_bytes} are accepted")
        if self._expected is not None and total > self._expected:
            raise LimitError(f"a message body of {total} bytes is refused: at most {self._expected} were asked for")
        most = limits.max_header_bytes
        if header_bytes > most:
            raise LimitError(f"a message header of {header_bytes} bytes is refused: {most} are accepted")
        if chunk != 0 or header_bytes == 0 or chunks != chunk_count(total, limits.chunk_bytes):
            raise FrameError(
                f"chunk {chunk} of {chunks} of a message of {header_bytes} + {total} bytes cannot begin a message"
            )
        return _Partial(header_bytes, chunks, total)

    def _decrypt(self, sealed: memoryview, aad: bytes, into: memoryview) -> None:
        keys, limits = self._keys, self._limits
        if keys.records >= limits.max_key_records or keys.bytes + len(into) > limits.max_key_bytes:
            raise LimitError(
                f"a key is used beyond its lifetime, {limits.max_key_records} records or {limits.max_key_bytes} bytes: "
                "the other side does not change it"
            )
        try:
            keys.aead.decrypt_into(keys.use(len(into)), sealed, aad, into)
        except InvalidTag:
            wipe(into)
            raise FrameError(
                "a frame is not authentic: it was changed on its way, or belongs to another session"
            ) from None


def _refuse_control(kind: Kind, _plain: bytes, _keys: KeyChain) -> None:
    raise FrameError(f"{kind.name} of a renewal came where none can be")


@dataclass(slots=True)
class _Partial:
    """A message of which some frames are still to come."""

    header_bytes: int
    chunks: int
    total: int
    chunk: int = 0
    header: bytearray = field(default_factory=bytearray)
    header_hash: bytes = b""
    body: bytearray = field(default_factory=bytearray)

    @property
    def next_sizes(self) -> tuple[int, int, int, int]:
        """Those that the prefix of the next frame has."""
        return self.header_bytes, self.chunk, self.chunks, self.total
