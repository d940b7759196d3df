"""Messages: a header and a body, of any operation, read by either side."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from fuzz.target import Cursor, Target, block
from support.example_messages import MESSAGES

from isthmus.common.errors import RemoteProtocolError
from isthmus.protocol import encoding, messages as m, site_encoding, validation
from isthmus.protocol.encoding import pack, peek, unpack
from isthmus.protocol.fields import Reader
from isthmus.protocol.limits import Limits
from isthmus.protocol.tensor_codecs import Payload

LIMITS = Limits(max_message_bytes=1 << 16, max_header_bytes=1 << 12)


def _run(data: bytes) -> None:
    cursor = Cursor(data)
    header, body = cursor.block(), cursor.rest()
    with contextlib.suppress(RemoteProtocolError):
        peek(header)
    for each in (body, filled(header, body)):
        with contextlib.suppress(RemoteProtocolError):
            _check(header, each, unpack(header, each, LIMITS))


def filled(header: bytes, body: bytes) -> bytes:
    """A body of the length that the header's tensors claim: cut, or with zeros behind it.

    A random body hardly ever has it, and what is checked of tensors comes later.
    """
    room = bytes(LIMITS.max_message_bytes)
    read = encoding._READERS.get(header[0]) if header and header[0] not in (m.Blob.op, m.Put.op) else None
    if read is None:
        return body
    reader = Reader(header[1:], room, LIMITS)
    with contextlib.suppress(RemoteProtocolError):
        read(reader)
    used = len(room) - len(reader._body)
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
    yield b"\x01\x00\xff"  # an operation that there is not


def _decoding() -> list[Any]:
    readers = [reader for name, reader in vars(encoding).items() if name.startswith("_read_")]
    readers += [reader for name, reader in vars(site_encoding).items() if name.startswith("_read_")]
    return [*readers, unpack, peek, Reader, validation]


TARGET = Target(_run, _seeds, _decoding(), floor=0.88, max_len=2048)
