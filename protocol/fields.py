"""Fields: how the parts of a message are written to a header and a body, and read back."""

from __future__ import annotations

import struct

from isthmus.common.errors import LimitError, MessageError
from isthmus.protocol.limits import Buffer, Limits
from isthmus.protocol.messages import DIGEST_BYTES, MAX_NAME, CallId, FileEntry, Shelf, SpanInputs
from isthmus.protocol.tensor_codecs import CODECS, Payload, Role, checked_sizes, codec_by_id

ALIGNMENT = 16

_CALL = struct.Struct("!IQH")
TIMES = struct.Struct("!QQQ")
U8, U16, U32, U64 = (struct.Struct(f) for f in ("!B", "!H", "!I", "!Q"))
HAS_MASK, HAS_POSITIONS = 1, 2

_ROLES = frozenset(int(role) for role in Role)
_SHELVES = frozenset(int(shelf) for shelf in Shelf)
_UNLIMITED = Limits(max_message_bytes=1 << 62)


def body_bytes(codec: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of `shape`, coded by the codec of that name, takes in a message's body, padding included."""
    return sum(size + -size % ALIGNMENT for size in CODECS[codec].sizes(shape))


class Writer:
    """Appends fields to a header and buffers to a body."""

    def __init__(self) -> None:
        self.header = bytearray()
        self.body: list[Buffer] = []

    def number(self, form: struct.Struct, *values: int) -> None:
        """Write numbers in a form."""
        self.header += form.pack(*values)

    def call(self, call: CallId) -> None:
        """Write a call's name."""
        self.number(_CALL, call.step, call.call, call.attempt)

    def text(self, text: str, limit: int) -> None:
        """Write a text, its length first."""
        raw = text.encode()
        if len(raw) > limit:
            raise ValueError(f"a text of {len(raw)} bytes is over {limit}")
        self.number(U16, len(raw))
        self.header += raw

    def fixed(self, raw: bytes, size: int) -> None:
        """Write bytes of a known length."""
        if len(raw) != size:
            raise ValueError(f"{size} bytes are needed, not {len(raw)}")
        self.header += raw

    def payload(self, payload: Payload) -> None:
        """Write a tensor: its descriptor, and its buffers."""
        shape = payload.shape
        sizes = checked_sizes(codec_by_id(payload.codec), shape, _UNLIMITED)
        if sizes != tuple(len(buffer) for buffer in payload.buffers):
            raise ValueError(f"the buffers of a payload of shape {list(shape)} do not have {sizes} bytes")
        self.header += struct.pack(f"!BBB{len(shape)}I", payload.codec, payload.role, len(shape), *shape)
        for buffer in payload.buffers:
            self.body.append(buffer)
            if len(buffer) % ALIGNMENT:
                self.body.append(bytes(-len(buffer) % ALIGNMENT))

    def payloads(self, payloads: tuple[Payload, ...]) -> None:
        """Write tensors, their number first."""
        self.number(U16, len(payloads))
        for payload in payloads:
            self.payload(payload)

    def inputs(self, inputs: SpanInputs) -> None:
        """Write the span's inputs that are there."""
        for payload in (inputs.hidden, inputs.attention_mask, inputs.position_ids):
            if payload is not None:
                self.payload(payload)


class Reader:
    """Takes fields from a header and buffers from a body; every take is checked against what is left."""

    def __init__(self, header: Buffer, body: Buffer, limits: Limits) -> None:
        if len(header) > limits.max_header_bytes:
            raise LimitError(
                f"a message header of {len(header)} bytes is refused: {limits.max_header_bytes} are accepted"
            )
        if len(body) > limits.max_message_bytes:
            raise LimitError(f"a message body of {len(body)} bytes is refused: {limits.max_message_bytes} are accepted")
        self._header = memoryview(header)
        self._body = memoryview(body)
        self._limits = limits

    def raw(self, count: int) -> bytes:
        """Take so many bytes of the header."""
        if count > len(self._header):
            raise MessageError(f"a message header ends {count - len(self._header)} bytes early")
        taken, self._header = bytes(self._header[:count]), self._header[count:]
        return taken

    def numbers(self, form: struct.Struct) -> tuple[int, ...]:
        """Take numbers in a form."""
        return form.unpack(self.raw(form.size))

    def number(self, form: struct.Struct) -> int:
        """Take a number in a form."""
        return self.numbers(form)[0]

    def flags(self, allowed: int) -> int:
        """Take a byte of flags, of which others than `allowed` are refused."""
        flags = self.number(U8)
        if flags & ~allowed:
            raise MessageError(f"unknown message flags {flags & ~allowed:#04x}")
        return flags

    def call(self) -> CallId:
        """Take a call's name."""
        return CallId(*self.numbers(_CALL))

    def text(self, limit: int) -> str:
        """Take a text of at most `limit` bytes."""
        count = self.number(U16)
        if count > limit:
            raise LimitError(f"a text of {count} bytes is refused: {limit} are accepted")
        try:
            return self.raw(count).decode()
        except UnicodeDecodeError as error:
            raise MessageError(f"a text is not UTF-8: {error.reason}") from error

    def _take(self, count: int) -> memoryview:
        if count > len(self._body):
            raise MessageError(f"a message body ends {count - len(self._body)} bytes early")
        taken, self._body = self._body[:count], self._body[count:]
        return taken

    def payload(self) -> Payload:
        """Take a tensor, a view of the body."""
        number, role, rank = self.raw(3)
        entry = codec_by_id(number)
        if not 1 <= rank <= self._limits.max_rank:
            raise LimitError(f"a tensor of rank {rank} is refused: rank 1 to {self._limits.max_rank} is accepted")
        if role not in _ROLES:
            raise MessageError(f"unknown tensor role {role}")
        shape = struct.unpack(f"!{rank}I", self.raw(4 * rank))
        buffers = []
        for size in checked_sizes(entry, shape, self._limits):
            buffers.append(self._take(size))
            if any(self._take(-size % ALIGNMENT)):
                raise MessageError("the padding of a message body is not zero")
        return Payload(codec=number, role=Role(role), shape=shape, buffers=tuple(buffers))

    def payloads(self, most: int) -> tuple[Payload, ...]:
        """Take at most so many tensors."""
        count = self.number(U16)
        if count > most:
            raise LimitError(f"a message of {count} tensors is refused: {most} are accepted")
        return tuple(self.payload() for _ in range(count))

    def inputs(self, flags: int) -> SpanInputs:
        """Take the span's inputs that the flags tell of."""
        hidden = self.payload()
        mask = self.payload() if flags & HAS_MASK else None
        positions = self.payload() if flags & HAS_POSITIONS else None
        return SpanInputs(hidden, mask, positions)

    def rest(self) -> memoryview:
        """Take what is left of the body."""
        return self._take(len(self._body))

    def shelf(self) -> Shelf:
        """Take the number of a shelf."""
        number = self.number(U8)
        if number not in _SHELVES:
            raise MessageError(f"unknown shelf {number}: the other side may run a newer version")
        return Shelf(number)

    def entries(self, most: int) -> tuple[FileEntry, ...]:
        """Take a list of at most so many files."""
        count = self.number(U16)
        if count > most:
            raise LimitError(f"a list of {count} files is refused: {most} are accepted")
        return tuple(FileEntry(self.text(MAX_NAME), self.number(U64), self.raw(DIGEST_BYTES)) for _ in range(count))

    def finish(self) -> None:
        """Make sure that nothing is left over."""
        if len(self._header) or len(self._body):
            raise MessageError(f"a message has {len(self._header)} header and {len(self._body)} body bytes too many")
