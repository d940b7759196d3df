"""Packing: a message to a header and a body, and back.

Rules
    1. `unpack(*pack(m)) == m`, and only what `pack` can write is accepted: one encoding per message, no bytes left
       over, padding of zeros.
    2. Nothing is allocated for a remote number before it was compared with a limit and with the bytes that are there.
       Tensors stay views of the body until `isthmus.protocol.tensor_codecs.decode`.

Theory of operation
    The header is the operation code, fixed fields, and a descriptor (codec, role, rank, dimensions) of each tensor.
    The body is the tensors' buffers in the order of the descriptors, each padded to a 16-byte boundary, so that a
    received tensor needs no copy. Numbers are big-endian. Optional parts are bits of one flag byte. One writer and
    one reader per message stand in the two tables.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from isthmus.common.errors import LimitError, LocalProtocolError, MessageError
from isthmus.protocol.fields import HAS_MASK, HAS_POSITIONS, TIMES, U8, U16, U32, U64, Reader, Writer
from isthmus.protocol.limits import DEFAULT_LIMITS, MAX_WORKERS, Buffer, Limits
from isthmus.protocol.messages import (
    DIGEST_BYTES,
    LINK_BYTES,
    MAX_NAME,
    MAX_PUT_FILES,
    MAX_TEXT,
    Account,
    Attach,
    Backward,
    BackwardReply,
    Blob,
    CallId,
    Fetch,
    FetchList,
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
    SiteAnswer,
    SpanInputs,
    Status,
    StatusCode,
    Workers,
)
from isthmus.protocol.site_encoding import SITE_READERS, SITE_WRITERS
from isthmus.protocol.site_messages import MAX_SITES
from isthmus.protocol.validation import check

_HAS_REPLAY, _KEEP, _RECOMPUTED, _HAS_CALL, _WANTED, _HAS_GRADIENT = 4, 8, 16, 32, 64, 128


def pack(message: Message) -> tuple[bytes, list[Buffer]]:
    """Write a message: its header, and the buffers that make up its body, padding included.

    Raises:
        LocalProtocolError: a field is out of range.
    """
    writer = Writer()
    writer.number(U8, message.op)
    try:
        _WRITERS[message.op](writer, message)
        check(message)
    except (struct.error, OverflowError, MessageError, LimitError, ValueError) as error:
        raise LocalProtocolError(f"{type(message).__name__} cannot be sent: {error}") from error
    return bytes(writer.header), writer.body


def unpack(header: Buffer, body: Buffer, limits: Limits = DEFAULT_LIMITS) -> Message:
    """Read a message. Its tensors are views of `body`.

    Raises:
        MessageError: the message is not one that `pack` writes.
        LimitError: a size or a rank is over a limit.
    """
    reader = Reader(header, body, limits)
    op = reader.number(U8)
    read = _READERS.get(op)
    if read is None:
        raise MessageError(f"unknown operation {op}: the other side may run a newer version")
    message = read(reader)
    reader.finish()
    check(message)
    return message


def peek(header: Buffer) -> tuple[int, CallId | None]:
    """The operation of an edge's message whose body was dropped, and the call that it names, where it names one.

    Raises:
        MessageError: the header is too short.
    """
    reader = Reader(header, b"", DEFAULT_LIMITS)
    op = reader.number(U8)
    if op in (Forward.op, Backward.op):
        reader.number(U8)  # flags
    elif op != SiteAnswer.op:
        return op, None
    return op, reader.call()


_INTERACTIVE, _SETTLED, _HAS_ACCOUNT = 1, 2, 4
_MAX_FILES = (1 << 16) - 1


def _input_flags(inputs: SpanInputs) -> int:
    return (HAS_MASK if inputs.attention_mask is not None else 0) | (
        HAS_POSITIONS if inputs.position_ids is not None else 0
    )


def _write_forward(w: Writer, m: Forward) -> None:
    w.number(U8, _input_flags(m.inputs) | (_KEEP if m.keep else 0) | (_WANTED if m.wanted else 0))
    w.call(m.id)
    w.number(U8, m.reply_codec)
    w.number(U32, m.sites)
    w.number(U32, m.lease)
    w.inputs(m.inputs)


def _read_forward(r: Reader) -> Forward:
    flags = r.flags(HAS_MASK | HAS_POSITIONS | _KEEP | _WANTED)
    call, reply, sites, lease = r.call(), r.number(U8), r.number(U32), r.number(U32)
    inputs = r.inputs(flags)
    keep, wanted = bool(flags & _KEEP), bool(flags & _WANTED)
    return Forward(call, keep, inputs.hidden, inputs.attention_mask, inputs.position_ids, reply, sites, wanted, lease)


def _write_forward_reply(w: Writer, m: ForwardReply) -> None:
    w.call(m.id)
    w.number(TIMES, m.compute_ns, m.crypto_ns, m.queue_ns)
    w.payload(m.hidden)
    w.payloads(m.taps)


def _read_forward_reply(r: Reader) -> ForwardReply:
    call, (compute, crypto, queue) = r.call(), r.numbers(TIMES)
    return ForwardReply(call, r.payload(), compute, crypto, queue, r.payloads(MAX_SITES))


def _write_backward(w: Writer, m: Backward) -> None:
    replay = 0 if m.replay is None else _HAS_REPLAY | _input_flags(m.replay)
    w.number(U8, replay | (_WANTED if m.wanted else 0))
    w.call(m.id)
    w.number(U8, m.reply_codec)
    w.number(U32, m.sites)
    w.number(U32, m.lease)
    w.payload(m.gradient)
    if m.replay is not None:
        w.inputs(m.replay)


def _read_backward(r: Reader) -> Backward:
    flags = r.flags(HAS_MASK | HAS_POSITIONS | _HAS_REPLAY | _WANTED)
    if flags & (HAS_MASK | HAS_POSITIONS) and not flags & _HAS_REPLAY:
        raise MessageError("a backward call has a mask or positions but no hidden states to replay")
    call, reply, sites, lease = r.call(), r.number(U8), r.number(U32), r.number(U32)
    gradient = r.payload()
    replay = r.inputs(flags) if flags & _HAS_REPLAY else None
    return Backward(call, gradient, replay, reply, sites, bool(flags & _WANTED), lease)


def _write_backward_reply(w: Writer, m: BackwardReply) -> None:
    w.number(U8, (_RECOMPUTED if m.recomputed else 0) | (_HAS_GRADIENT if m.gradient is not None else 0))
    w.call(m.id)
    w.number(TIMES, m.compute_ns, m.crypto_ns, m.queue_ns)
    if m.gradient is not None:
        w.payload(m.gradient)
    w.payloads(m.lent)


def _read_backward_reply(r: Reader) -> BackwardReply:
    flags = r.flags(_RECOMPUTED | _HAS_GRADIENT)
    call, (compute, crypto, queue) = r.call(), r.numbers(TIMES)
    gradient = r.payload() if flags & _HAS_GRADIENT else None
    return BackwardReply(call, gradient, compute, crypto, queue, bool(flags & _RECOMPUTED), r.payloads(2 * MAX_SITES))


def _write_fetch(w: Writer, m: Fetch) -> None:
    w.number(U8, m.shelf)
    w.text(m.name, MAX_NAME)
    w.number(U64, m.offset)


def _write_piece(w: Writer, m: Blob | Put) -> None:
    w.text(m.name, MAX_NAME)
    w.number(U64, m.offset)
    w.number(U64, m.total)
    w.fixed(m.sha256, DIGEST_BYTES)
    if len(m.data):
        w.body.append(memoryview(m.data).cast("B"))


def _read_blob(r: Reader) -> Blob:
    return Blob(r.text(MAX_NAME), r.number(U64), r.number(U64), r.raw(DIGEST_BYTES), r.rest())


def _read_put(r: Reader) -> Put:
    return Put(r.text(MAX_NAME), r.number(U64), r.number(U64), r.raw(DIGEST_BYTES), r.rest())


def _write_put_reply(w: Writer, m: PutReply) -> None:
    w.text(m.name, MAX_NAME)
    w.fixed(m.sha256, DIGEST_BYTES)
    w.number(U64, m.held)


def _write_entries(w: Writer, m: FileList | PlugIn) -> None:
    w.number(U16, len(m.entries))
    for entry in m.entries:
        w.text(entry.name, MAX_NAME)
        w.number(U64, entry.size)
        w.fixed(entry.sha256, DIGEST_BYTES)


def _write_status(w: Writer, m: Status) -> None:
    w.number(U8, _HAS_CALL if m.id is not None else 0)
    w.number(U8, m.code)
    if m.id is not None:
        w.call(m.id)
    w.text(m.message, MAX_TEXT)


def _read_status(r: Reader) -> Status:
    flags, code = r.flags(_HAS_CALL), r.number(U8)
    if code not in _STATUS_CODES:
        raise MessageError(f"unknown status code {code}: the other side may run a newer version")
    return Status(StatusCode(code), r.call() if flags else None, r.text(MAX_TEXT))


def _write_attach(w: Writer, m: Attach) -> None:
    flags = (_INTERACTIVE if m.interactive else 0) | (_SETTLED if m.settled else 0)
    w.number(U8, flags | (_HAS_ACCOUNT if m.account is not None else 0))
    w.number(U32, m.deadline_ms)
    w.fixed(m.link, LINK_BYTES)
    if m.account is not None:
        w.text(m.account.tenant, MAX_NAME)
        w.number(U32, m.account.weight)


def _read_attach(r: Reader) -> Attach:
    flags, deadline_ms = r.flags(_INTERACTIVE | _SETTLED | _HAS_ACCOUNT), r.number(U32)
    link = r.raw(LINK_BYTES)
    account = Account(r.text(MAX_NAME), r.number(U32)) if flags & _HAS_ACCOUNT else None
    return Attach(link, bool(flags & _INTERACTIVE), deadline_ms, bool(flags & _SETTLED), account)


def _write_workers(w: Writer, m: Workers) -> None:
    w.number(U8, len(m.addresses))
    for address in (*m.addresses, m.go_to):
        w.text(address, MAX_NAME)


def _read_workers(r: Reader) -> Workers:
    count = r.number(U8)
    if count > MAX_WORKERS:
        raise MessageError(f"a list of {count} workers is refused: {MAX_WORKERS} are accepted")
    return Workers(tuple(r.text(MAX_NAME) for _ in range(count)), r.text(MAX_NAME))


def _write_pong(w: Writer, m: Pong) -> None:
    w.number(U64, m.nonce)
    w.number(U64, m.peak_bytes)


_STATUS_CODES = frozenset(int(code) for code in StatusCode)
# Each function takes the one message class that its operation code stands for; the table's types cannot say so.
_WRITERS: dict[int, Callable[..., None]] = {
    Forward.op: _write_forward,
    ForwardReply.op: _write_forward_reply,
    Backward.op: _write_backward,
    BackwardReply.op: _write_backward_reply,
    Fetch.op: _write_fetch,
    Blob.op: _write_piece,
    FetchList.op: lambda w, m: w.number(U8, m.shelf),
    FileList.op: _write_entries,
    Status.op: _write_status,
    Ping.op: lambda w, m: w.number(U64, m.nonce),
    Pong.op: _write_pong,
    Goodbye.op: lambda w, m: w.text(m.reason, MAX_TEXT),
    Attach.op: _write_attach,
    Put.op: _write_piece,
    PutReply.op: _write_put_reply,
    PlugIn.op: _write_entries,
    Workers.op: _write_workers,
    **SITE_WRITERS,
}
_READERS: dict[int, Callable[[Reader], Message]] = {
    Forward.op: _read_forward,
    ForwardReply.op: _read_forward_reply,
    Backward.op: _read_backward,
    BackwardReply.op: _read_backward_reply,
    Fetch.op: lambda r: Fetch(r.shelf(), r.text(MAX_NAME), r.number(U64)),
    Blob.op: _read_blob,
    FetchList.op: lambda r: FetchList(r.shelf()),
    FileList.op: lambda r: FileList(r.entries(_MAX_FILES)),
    Status.op: _read_status,
    Ping.op: lambda r: Ping(r.number(U64)),
    Pong.op: lambda r: Pong(r.number(U64), r.number(U64)),
    Goodbye.op: lambda r: Goodbye(r.text(MAX_TEXT)),
    Attach.op: _read_attach,
    Put.op: _read_put,
    PutReply.op: lambda r: PutReply(r.text(MAX_NAME), r.raw(DIGEST_BYTES), r.number(U64)),
    PlugIn.op: lambda r: PlugIn(r.entries(MAX_PUT_FILES)),
    Workers.op: _read_workers,
    **SITE_READERS,
}
