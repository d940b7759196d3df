"""The file of a recording: messages as they came and went, each with its session and its direction.

Layout
    magic, then entries one after another, until the end of the file:

    kind u8 | session 16 bytes | header bytes u32 | body bytes u64 | CRC-32 u32 | header | body

    Numbers are big-endian. The checksum is of all the rest of the entry. Header and body are a message's as
    `isthmus.protocol.encoding` writes it: there is one encoding of a message, so they are the bytes that crossed the
    wire inside the encryption. The first entry of a session has kind `OPENED`: its header is the session's
    information (`pack_info`), its body the header of an `Attach` that names link and tenant.

Nothing in it is code (no pickle), and nothing is allocated for a number before it was compared with the file's size.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from isthmus.common.errors import DataError, RemoteProtocolError
from isthmus.protocol.encoding import pack, pack_info, unpack, unpack_info
from isthmus.protocol.limits import Buffer, Limits
from isthmus.protocol.messages import Attach, Message, SessionInfo

MAGIC = b"isthmus recording 1\n"
_ENTRY = struct.Struct("!B16sIQI")
UNLIMITED = Limits(max_message_bytes=1 << 62)
"""A message is as large as the cloud that took it allowed; an entry is compared with the file instead."""


class Kind(enum.IntEnum):
    """What an entry holds."""

    OPENED = 0
    """A session was opened."""
    FROM_EDGE = 1
    """A message as it was received."""
    TO_EDGE = 2
    """A message as it was sent."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A session that was opened: what its edge was told of the model, and what the edge said first."""

    info: SessionInfo
    attach: Attach


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a recording.

    Attributes:
        kind: what it holds.
        session: the session's id, 16 bytes.
        content: the message, whose tensors are views of memory of its own; or the session that was opened.
        offset: the byte of the file that it begins at.
    """

    kind: Kind
    session: bytes
    content: Message | Opened
    offset: int


def entry_of(kind: Kind, session: bytes, message: Message) -> list[Buffer]:
    """The bytes of an entry with a message, in pieces: a message's tensors are not copied.

    Raises:
        LocalProtocolError: a field of the message is out of range.
    """
    header, body = pack(message)
    return _pieces(kind, session, header, body)


def opening_of(info: SessionInfo, attach: Attach) -> list[Buffer]:
    """The bytes of the entry that a session begins with, in pieces.

    Raises:
        LocalProtocolError: a field is out of range.
    """
    header, _ = pack(attach)
    return _pieces(Kind.OPENED, bytes.fromhex(info.session_id), pack_info(info), [header])


def _pieces(kind: Kind, session: bytes, header: bytes, body: list[Buffer]) -> list[Buffer]:
    size = sum(len(piece) for piece in body)
    start = (kind, session, len(header), size)
    return [_ENTRY.pack(*start, _checksum(start, [header, *body])), header, *body]


def _checksum(start: tuple[int, bytes, int, int], pieces: Iterable[Buffer]) -> int:
    value = zlib.crc32(_ENTRY.pack(*start, 0))
    for piece in pieces:
        value = zlib.crc32(piece, value)
    return value


def read_entries(path: Path) -> Iterator[Entry]:
    """Read a file of a recording, entry by entry.

    Raises:
        DataError: it cannot be read, is no recording, or is damaged or cut off. The message names the file and the
            offset of the first entry that is not whole.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if file.read(len(MAGIC)) != MAGIC:
                raise DataError(
                    f"{path} is no recording, from byte 0 on: give what `isthmus cloud serve --record` wrote"
                )
            while (offset := file.tell()) < size:
                yield _read_entry(file, path, offset, size)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the file and its mode") from error


def _read_entry(file: BinaryIO, path: Path, offset: int, size: int) -> Entry:
    start = file.read(_ENTRY.size)
    if len(start) < _ENTRY.size:
        raise fault(path, offset, "is cut off")
    kind, session, header_bytes, body_bytes, checksum = _ENTRY.unpack(start)
    if header_bytes + body_bytes > size - offset - _ENTRY.size:
        raise fault(path, offset, "is cut off, or its length is damaged")
    header, body = file.read(header_bytes), bytearray(body_bytes)
    file.readinto(body)  # type: ignore[attr-defined]  # every buffered file has it
    if _checksum((kind, session, header_bytes, body_bytes), (header, body)) != checksum:
        raise fault(path, offset, "is damaged: its checksum is another")
    try:
        if kind == Kind.OPENED:
            attach = unpack(bytes(body), b"", UNLIMITED)
            if not isinstance(attach, Attach):
                raise fault(path, offset, f"opens a session with {type(attach).__name__}")
            return Entry(Kind.OPENED, session, Opened(unpack_info(header), attach), offset)
        return Entry(Kind(kind), session, unpack(header, body, UNLIMITED), offset)
    except (RemoteProtocolError, ValueError) as error:  # the second: of a kind that there is not
        if isinstance(error, DataError):
            raise
        raise fault(path, offset, f"is none of this release: {error}") from error


def fault(path: Path, offset: int, what: str) -> DataError:
    """What is wrong with the entry at an offset of a file."""
    return DataError(
        f"the entry at byte {offset} of {path} {what}. What is before it is whole: `truncate -s {offset}` of a copy "
        "keeps that"
    )
