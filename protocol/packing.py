"""Packing: a message to a header and a body, and back.

Rules
    1. `unpack(*pack(m)) == m`, and only what `pack` can write is accepted: one encoding per message, no bytes left
       over, padding of zeros.
    2. Nothing is allocated for a remote number before it was compared with a limit and with the bytes that are there.
       Tensors stay views of the body until `isthmus.protocol.codecs.decode`.

Theory of operation
    The header is the operation code, fixed fields, and a descriptor (codec, role, rank, dimensions) of each tensor.
    The body is the tensors' buffers in the order of the descriptors, each padded to a 16-byte boundary, so that a
    received tensor needs no copy. Numbers are big-endian. Optional parts are bits of one flag byte. One writer and
    one reader per message stand in the two tables.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from isthmus.protocol.checks import check
from isthmus.protocol.codecs import Payload, Role, checked_sizes, codec_by_id
from isthmus.protocol.errors import LimitError, LocalProtocolError, MessageError
from isthmus.protocol.limits import DEFAULT_LIMITS, Buffer, Limits
from isthmus.protocol.messages import (
    DIGEST_BYTES,
    LINK_BYTES,
    MAX_NAME,
    MAX_PUT_FILES,
    MAX_TEXT,
    Attach,
    Backward,
    BackwardReply,
    Blob,
    CallId,
    Fetch,
    FetchList,
    FileEntry,
    FileList,
    Forward,
    ForwardReply,
    Goodbye,
    Message,
    Ping,
    PlugIn,
    Pong,
    Put,
    PutReply,
    Shelf,
    SpanInputs,
    Status,
    StatusCode,
)

ALIGNMENT = 16

_CALL = struct.Struct("!IQH")
_TIMES = struct.Struct("!QQQ")
_U8, _U16, _U32, _U64 = (struct.Struct(f) for f in ("!B", "!H", "!I", "!Q"))
_HAS_MASK, _HAS_POSITIONS, _HAS_REPLAY, _KEEP, _RECOMPUTED, _HAS_CALL = 1, 2, 4, 8, 16, 32


def pack(message: Message) -> tuple[bytes, list[Buffer]]:
    """Write a message: its header, and the buffers that make up its body, padding included.

    Raises:
        LocalProtocolError: a field is out of range.
    """
    writer = _Writer()
    writer.number(_U8, message.op)
    try:
        _WRITERS[message.op](writer, message)
        check(message)
    except (struct.error, MessageError, ValueError) as error:
        raise LocalProtocolError(f"{type(message).__name__} cannot be sent: {error}") from error
    return bytes(writer.header), writer.body


def unpack(header: Buffer, body: Buffer, limits: Limits = DEFAULT_LIMITS) -> Message:
    """Read a message. Its tensors are views of `body`.

    Raises:
        MessageError: the message is not one that `pack` writes.
        LimitError: a size or a rank is over a limit.
    """
    reader = _Reader(header, body, limits)
    op = reader.number(_U8)
    read = _READERS.get(op)
    if read is None:
        raise MessageError(f"unknown operation {op}: the other side may run a newer version")
    message = read(reader)
    reader.finish()
    check(message)
    return message


class _Writer:
    """Appends fields to a header and buffers to a body."""

    def __init__(self) -> None:
        self.header = bytearray()
        self.body: list[Buffer] = []

    def number(self, form: struct.Struct, *values: int) -> None:
        self.header += form.pack(*values)

    def call(self, call: CallId) -> None:
        self.number(_CALL, call.step, call.call, call.attempt)

    def text(self, text: str, limit: int) -> None:
        raw = text.encode()
        if len(raw) > limit:
            raise ValueError(f"a text of {len(raw)} bytes is over {limit}")
        self.number(_U16, len(raw))
        self.header += raw

    def fixed(self, raw: bytes, size: int) -> None:
        if len(raw) != size:
            raise ValueError(f"{size} bytes are needed, not {len(raw)}")
        self.header += raw

    def payload(self, payload: Payload) -> None:
        shape = payload.shape
        sizes = checked_sizes(codec_by_id(payload.codec), shape, _UNLIMITED)
        if sizes != tuple(len(buffer) for buffer in payload.buffers):
            raise ValueError(f"the buffers of a payload of shape {list(shape)} do not have {sizes} bytes")
        self.header += struct.pack(f"!BBB{len(shape)}I", payload.codec, payload.role, len(shape), *shape)
        for buffer in payload.buffers:
            self.body.append(buffer)
            if len(buffer) % ALIGNMENT:
                self.body.append(bytes(-len(buffer) % ALIGNMENT))

    def inputs(self, inputs: SpanInputs) -> None:
        for payload in (inputs.hidden, inputs.attention_mask, inputs.position_ids):
            if payload is not None:
                self.payload(payload)


class _Reader:
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
        if count > len(self._header):
            raise MessageError(f"a message header ends {count - len(self._header)} bytes early")
        taken, self._header = bytes(self._header[:count]), self._header[count:]
        return taken

    def numbers(self, form: struct.Struct) -> tuple[int, ...]:
        return form.unpack(self.raw(form.size))

    def number(self, form: struct.Struct) -> int:
        return self.numbers(form)[0]

    def flags(self, allowed: int) -> int:
        flags = self.number(_U8)
        if flags & ~allowed:
            raise MessageError(f"unknown message flags {flags & ~allowed:#04x}")
        return flags

    def call(self) -> CallId:
        return CallId(*self.numbers(_CALL))

    def text(self, limit: int) -> str:
        count = self.number(_U16)
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

    def inputs(self, flags: int) -> SpanInputs:
        hidden = self.payload()
        mask = self.payload() if flags & _HAS_MASK else None
        positions = self.payload() if flags & _HAS_POSITIONS else None
        return SpanInputs(hidden, mask, positions)

    def rest(self) -> memoryview:
        return self._take(len(self._body))

    def shelf(self) -> Shelf:
        number = self.number(_U8)
        if number not in _SHELVES:
            raise MessageError(f"unknown shelf {number}: the other side may run a newer version")
        return Shelf(number)

    def entries(self, most: int) -> tuple[FileEntry, ...]:
        count = self.number(_U16)
        if count > most:
            raise LimitError(f"a list of {count} files is refused: {most} are accepted")
        return tuple(FileEntry(self.text(MAX_NAME), self.number(_U64), self.raw(DIGEST_BYTES)) for _ in range(count))

    def finish(self) -> None:
        if len(self._header) or len(self._body):
            raise MessageError(f"a message has {len(self._header)} header and {len(self._body)} body bytes too many")


_UNLIMITED = Limits(max_message_bytes=1 << 62)
_ROLES = frozenset(int(role) for role in Role)
_SHELVES = frozenset(int(shelf) for shelf in Shelf)
_MAX_FILES = (1 << 16) - 1


def _input_flags(inputs: SpanInputs) -> int:
    return (_HAS_MASK if inputs.attention_mask is not None else 0) | (
        _HAS_POSITIONS if inputs.position_ids is not None else 0
    )


def _write_forward(w: _Writer, m: Forward) -> None:
    w.number(_U8, _input_flags(m.inputs) | (_KEEP if m.keep else 0))
    w.call(m.id)
    w.number(_U8, m.reply_codec)
    w.inputs(m.inputs)


def _read_forward(r: _Reader) -> Forward:
    flags = r.flags(_HAS_MASK | _HAS_POSITIONS | _KEEP)
    call, reply = r.call(), r.number(_U8)
    inputs = r.inputs(flags)
    return Forward(call, bool(flags & _KEEP), inputs.hidden, inputs.attention_mask, inputs.position_ids, reply)


def _write_forward_reply(w: _Writer, m: ForwardReply) -> None:
    w.call(m.id)
    w.number(_TIMES, m.compute_ns, m.crypto_ns, m.queue_ns)
    w.payload(m.hidden)


def _read_forward_reply(r: _Reader) -> ForwardReply:
    call, (compute, crypto, queue) = r.call(), r.numbers(_TIMES)
    return ForwardReply(call, r.payload(), compute, crypto, queue)


def _write_backward(w: _Writer, m: Backward) -> None:
    w.number(_U8, 0 if m.replay is None else _HAS_REPLAY | _input_flags(m.replay))
    w.call(m.id)
    w.number(_U8, m.reply_codec)
    w.payload(m.gradient)
    if m.replay is not None:
        w.inputs(m.replay)


def _read_backward(r: _Reader) -> Backward:
    flags = r.flags(_HAS_MASK | _HAS_POSITIONS | _HAS_REPLAY)
    if flags and not flags & _HAS_REPLAY:
        raise MessageError("a backward call has a mask or positions but no hidden states to replay")
    call, reply, gradient = r.call(), r.number(_U8), r.payload()
    return Backward(call, gradient, r.inputs(flags) if flags else None, reply)


def _write_backward_reply(w: _Writer, m: BackwardReply) -> None:
    w.number(_U8, _RECOMPUTED if m.recomputed else 0)
    w.call(m.id)
    w.number(_TIMES, m.compute_ns, m.crypto_ns, m.queue_ns)
    w.payload(m.gradient)


def _read_backward_reply(r: _Reader) -> BackwardReply:
    recomputed = bool(r.flags(_RECOMPUTED))
    call, (compute, crypto, queue) = r.call(), r.numbers(_TIMES)
    return BackwardReply(call, r.payload(), compute, crypto, queue, recomputed)


def _write_fetch(w: _Writer, m: Fetch) -> None:
    w.number(_U8, m.shelf)
    w.text(m.name, MAX_NAME)
    w.number(_U64, m.offset)


def _write_piece(w: _Writer, m: Blob | Put) -> None:
    w.text(m.name, MAX_NAME)
    w.number(_U64, m.offset)
    w.number(_U64, m.total)
    w.fixed(m.sha256, DIGEST_BYTES)
    if len(m.data):
        w.body.append(memoryview(m.data).cast("B"))


def _read_blob(r: _Reader) -> Blob:
    return Blob(r.text(MAX_NAME), r.number(_U64), r.number(_U64), r.raw(DIGEST_BYTES), r.rest())


def _read_put(r: _Reader) -> Put:
    return Put(r.text(MAX_NAME), r.number(_U64), r.number(_U64), r.raw(DIGEST_BYTES), r.rest())


def _write_put_reply(w: _Writer, m: PutReply) -> None:
    w.text(m.name, MAX_NAME)
    w.fixed(m.sha256, DIGEST_BYTES)
    w.number(_U64, m.held)


def _write_entries(w: _Writer, m: FileList | PlugIn) -> None:
    w.number(_U16, len(m.entries))
    for entry in m.entries:
        w.text(entry.name, MAX_NAME)
        w.number(_U64, entry.size)
        w.fixed(entry.sha256, DIGEST_BYTES)


def _write_status(w: _Writer, m: Status) -> None:
    w.number(_U8, _HAS_CALL if m.id is not None else 0)
    w.number(_U8, m.code)
    if m.id is not None:
        w.call(m.id)
    w.text(m.message, MAX_TEXT)


def _read_status(r: _Reader) -> Status:
    flags, code = r.flags(_HAS_CALL), r.number(_U8)
    if code not in _STATUS_CODES:
        raise MessageError(f"unknown status code {code}: the other side may run a newer version")
    return Status(StatusCode(code), r.call() if flags else None, r.text(MAX_TEXT))


def _write_pong(w: _Writer, m: Pong) -> None:
    w.number(_U64, m.nonce)
    w.number(_U64, m.peak_bytes)


_STATUS_CODES = frozenset(int(code) for code in StatusCode)
# Each function takes the one message class that its operation code stands for; the table's types cannot say so.
_WRITERS: dict[int, Callable[..., None]] = {
    Forward.op: _write_forward,
    ForwardReply.op: _write_forward_reply,
    Backward.op: _write_backward,
    BackwardReply.op: _write_backward_reply,
    Fetch.op: _write_fetch,
    Blob.op: _write_piece,
    FetchList.op: lambda w, m: w.number(_U8, m.shelf),
    FileList.op: _write_entries,
    Status.op: _write_status,
    Ping.op: lambda w, m: w.number(_U64, m.nonce),
    Pong.op: _write_pong,
    Goodbye.op: lambda w, m: w.text(m.reason, MAX_TEXT),
    Attach.op: lambda w, m: w.fixed(m.link, LINK_BYTES),
    Put.op: _write_piece,
    PutReply.op: _write_put_reply,
    PlugIn.op: _write_entries,
}
_READERS: dict[int, Callable[[_Reader], Message]] = {
    Forward.op: _read_forward,
    ForwardReply.op: _read_forward_reply,
    Backward.op: _read_backward,
    BackwardReply.op: _read_backward_reply,
    Fetch.op: lambda r: Fetch(r.shelf(), r.text(MAX_NAME), r.number(_U64)),
    Blob.op: _read_blob,
    FetchList.op: lambda r: FetchList(r.shelf()),
    FileList.op: lambda r: FileList(r.entries(_MAX_FILES)),
    Status.op: _read_status,
    Ping.op: lambda r: Ping(r.number(_U64)),
    Pong.op: lambda r: Pong(r.number(_U64), r.number(_U64)),
    Goodbye.op: lambda r: Goodbye(r.text(MAX_TEXT)),
    Attach.op: lambda r: Attach(r.raw(LINK_BYTES)),
    Put.op: _read_put,
    PutReply.op: lambda r: PutReply(r.text(MAX_NAME), r.raw(DIGEST_BYTES), r.number(_U64)),
    PlugIn.op: lambda r: PlugIn(r.entries(MAX_PUT_FILES)),
}
