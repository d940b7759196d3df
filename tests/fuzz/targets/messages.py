"""Messages: a header and a body, of any operation, read by either side."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any
from unittest import mock

from fuzz.target import Cursor, Target, block
from google.protobuf.message import DecodeError
from support.protocol.example_messages import MESSAGES
from support.protocol.mutations import mutations

from isthmus.common.errors import LocalProtocolError, RemoteProtocolError
from isthmus.protocol import encoding, isthmus_pb2 as pb, messages as m
from isthmus.protocol.encoding import pack, peek, unpack
from isthmus.protocol.limits import Limits
from isthmus.protocol.tensor_codecs import Payload, check_hidden

MAX_LEN = 2048
LIMITS = Limits(max_message_bytes=1 << 16, max_header_bytes=1 << 12)


def _run(data: bytes) -> None:
    cursor = Cursor(data)
    header, body = cursor.block(), cursor.rest()
    with contextlib.suppress(RemoteProtocolError):
        peek(header)
    for form in {header, canonical(header)}:
        for each in (body, filled(form, body)):
            with contextlib.suppress(RemoteProtocolError):
                _check(form, each, unpack(form, each, LIMITS))


def canonical(header: bytes) -> bytes:
    """The one form that is accepted of a header, where protobuf can read it: a random header hardly ever has it."""
    try:
        parsed = pb.Header.FromString(header)
    except DecodeError:
        return header
    parsed.DiscardUnknownFields()
    return bytes(parsed.SerializeToString(deterministic=True))


def filled(header: bytes, body: bytes) -> bytes:
    """A body of the length that the header's tensors claim: cut, or with zeros behind it.

    A random body hardly ever has it, and what is checked of tensors comes later.
    """
    room = encoding._Body(bytes(LIMITS.max_message_bytes), LIMITS)
    with contextlib.suppress(RemoteProtocolError):
        kind, values = encoding._parse_header(header, LIMITS)
        if kind in (m.Blob, m.Put):
            return body
        encoding._read(kind, values, room)
    used = LIMITS.max_message_bytes - len(room._left)
    return body.ljust(used, b"\0")[:used]


def _check(header: bytes, body: bytes, message: m.Message) -> None:
    again, buffers = pack(message)
    if (again, b"".join(buffers)) != (header, body):
        raise AssertionError(f"{type(message).__name__} has two encodings")
    for payload in payloads(message):
        if payload.nbytes > len(body):
            raise AssertionError("a tensor has more bytes than came")
    if isinstance(message, m.Fetch | m.Blob | m.Put | m.PutReply):
        safe_name(message.name)
    if isinstance(message, m.FileList | m.PlugIn):
        for entry in message.entries:
            safe_name(entry.name)


def payloads(value: Any) -> Iterator[Payload]:
    """All tensors of a message."""
    if isinstance(value, Payload):
        yield value
    elif isinstance(value, tuple):
        for each in value:
            yield from payloads(each)
    elif is_dataclass(value):
        for entry in fields(value):
            yield from payloads(getattr(value, entry.name))


def safe_name(name: str) -> None:
    """Fail unless a name stays in the folder that it is joined to."""
    if name in ("", ".", "..") or name.startswith(".") or {"/", "\\", "\0"} & set(name) or len(name.encode()) > 255:
        raise AssertionError(f"{name!r} is no safe name of a file")


def packed(message: m.Message) -> bytes:
    """The target's input that is this message."""
    header, buffers = pack(message)
    return block(header) + b"".join(buffers)


def _seeds() -> Iterator[bytes]:
    yield from map(packed, MESSAGES)
    with mock.patch.object(encoding, "check"):
        for message in MESSAGES:
            for _, bad in mutations(message):
                with contextlib.suppress(LocalProtocolError):
                    header, buffers = pack(bad)
                    if len(header) + sum(map(len, buffers)) < MAX_LEN:
                        yield block(header) + b"".join(buffers)
    yield b"\x02\x00\xaa\x01"  # the last message, cut
    status = packed(m.Status(m.StatusCode.OK, None, ""))
    yield block(status[2:] + b"\xb2\x01\x00")  # a message that there is not, beside one
    yield block(b"\xb2\x01\x00")  # and alone


DECODERS: list[Any] = [unpack, peek, encoding._parse_header, encoding._parse, encoding._read, encoding._Body]
KINDS = (*m.EDGE_SENDS, *m.CLOUD_SENDS, m.SpanInputs, m.LeasedWeights)
CHECKS = [encoding.check, encoding._check_rule, check_hidden, m.check_lora, m._check_call]
CHECKS += [kind.check for kind in KINDS if hasattr(kind, "check")]
TARGET = Target(_run, _seeds, [*DECODERS, *CHECKS], floor=0.88, max_len=MAX_LEN)
