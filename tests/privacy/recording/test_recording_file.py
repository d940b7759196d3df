"""The file of a recording: what was written is read, and what is damaged or cut off is one clear error."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from support.protocol.wire import TENANT, cloud_messages, edge_messages, forward, session_info

from isthmus.common.errors import DataError
from isthmus.privacy.recording.recording_file import MAGIC, Kind, Opened, entry_of, opening_of, read_entries
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import pack

SESSION = b"s" * 16
INFO = session_info(TENANT, SESSION)
ATTACH = m.Attach(b"l" * 16, account=m.Account("alice", 1))


def raw(message: m.Message) -> bytes:
    header, body = pack(message)
    return header + b"".join(body)


def written(path: Path, *messages: tuple[Kind, m.Message]) -> list[int]:
    """Write a file; where each of its entries begins."""
    entries = [opening_of(INFO, ATTACH), *(entry_of(kind, SESSION, message) for kind, message in messages)]
    data, offsets = MAGIC, []
    for entry in entries:
        offsets.append(len(data))
        data += b"".join(entry)
    path.write_bytes(data)
    return offsets


@settings(max_examples=50)
@given(sent=edge_messages, answer=cloud_messages)
def test_what_was_written_is_read_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, sent: m.Message, answer: m.Message
) -> None:
    path = tmp_path_factory.mktemp("file") / "recording.bin"
    offsets = written(path, (Kind.FROM_EDGE, sent), (Kind.TO_EDGE, answer))
    opened, first, second = read_entries(path)
    assert opened.content == Opened(INFO, ATTACH)
    assert [each.kind for each in (first, second)] == [Kind.FROM_EDGE, Kind.TO_EDGE]
    assert {each.session for each in (opened, first, second)} == {SESSION}
    assert not isinstance(first.content, Opened)
    assert not isinstance(second.content, Opened)
    assert (raw(first.content), raw(second.content)) == (raw(sent), raw(answer))
    assert [each.offset for each in (opened, first, second)] == offsets


def test_a_file_that_is_cut_off_is_told_with_the_offset_of_its_last_entry(tmp_path: Path) -> None:
    path = tmp_path / "recording.bin"
    offsets = written(path, (Kind.FROM_EDGE, forward((1, 2, 8))))
    data = path.read_bytes()
    for size in range(len(MAGIC), len(data)):
        path.write_bytes(data[:size])
        if size in offsets or size == len(MAGIC):
            assert len(list(read_entries(path))) == sum(offset < size for offset in offsets)
            continue
        last = max(offset for offset in offsets if offset < size)
        with pytest.raises(DataError, match=rf"^the entry at byte {last} of {path} is cut off.*truncate -s {last}"):
            list(read_entries(path))


def test_a_flipped_bit_is_told_with_the_offset_of_its_entry(tmp_path: Path) -> None:
    path = tmp_path / "recording.bin"
    offsets = written(path, (Kind.FROM_EDGE, forward((1, 2, 8))))
    data = path.read_bytes()
    assert len(list(read_entries(path))) == 2
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        begun = [offset for offset in offsets if offset <= at]
        told = f"the entry at byte {begun[-1]} of {path} " if begun else f"{path} is no recording, from byte 0"
        with pytest.raises(DataError, match=told):
            list(read_entries(path))


@pytest.mark.parametrize(
    ("kind", "header", "body", "told"),
    [
        (9, pack(m.Ping(1))[0], b"", "none of this release: 9 is not a valid Kind"),
        (Kind.FROM_EDGE, b"\xff", b"", "none of this release: a message header"),
        (Kind.OPENED, b"\xff", pack(ATTACH)[0], "none of this release: session information"),
        (Kind.OPENED, b"", pack(m.Ping(1))[0], "opens a session with Ping"),
    ],
    ids=["kind", "message", "information", "attach"],
)
def test_an_entry_that_is_whole_and_makes_no_sense_is_told(
    kind: int, header: bytes, body: bytes, told: str, tmp_path: Path
) -> None:
    start = struct.Struct("!B16sIQI")
    checksum = zlib.crc32(start.pack(kind, SESSION, len(header), len(body), 0) + header + body)
    path = tmp_path / "recording.bin"
    path.write_bytes(MAGIC + start.pack(kind, SESSION, len(header), len(body), checksum) + header + body)
    with pytest.raises(DataError, match=rf"at byte {len(MAGIC)} of .*{told}"):
        list(read_entries(path))


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"recording\.bin cannot be read"):
        list(read_entries(tmp_path / "recording.bin"))
