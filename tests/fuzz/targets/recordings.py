"""A recording of `cloud serve --record`, as attacks read it: its entries, and the tensors that become of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from fuzz.target import Cursor, Target, block, scratch
from fuzz.targets.messages import canonical, filled
from support.protocol.example_messages import MESSAGES
from support.protocol.wire import TENANT, session_info

from isthmus.common.errors import DataError
from isthmus.privacy.recording import recording_file, traffic
from isthmus.privacy.recording.recording_file import MAGIC, Kind, entry_of, opening_of
from isthmus.privacy.recording.traffic import read_traffic
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import pack

_SESSION = bytes(range(16))
_OPENING = b"".join(opening_of(session_info(TENANT, _SESSION), m.Attach(b"l" * 16, account=m.Account("tenant", 1))))


@functools.cache
def _folder() -> Path:
    return scratch()


def _run(data: bytes) -> None:
    script = Cursor(data)
    content = _sealed(script) if script.number() % 2 else script.rest()
    (_folder() / "recording.bin").write_bytes(content)
    try:
        found = read_traffic(_folder())
    except DataError as error:
        str(error).encode(errors="backslashreplace")
        return
    for each in (*found.forwards, *found.decodes):
        if not torch.isfinite(each.hidden).all() or each.hidden.dim() != 3:
            raise AssertionError("a forward has hidden states that no cloud takes")


def _sealed(script: Cursor) -> bytes:
    """A recording of one session with the script's messages, whose checksums are right."""
    entries = [MAGIC, _OPENING]
    while script:
        kind = Kind(1 + script.number() % 2)
        header, body = canonical(script.block()), script.block()
        entries += recording_file._pieces(kind, _SESSION, header, [filled(header, body)])
    return b"".join(entries)


def _one(message: m.Message) -> bytes:
    header, body = pack(message)
    return bytes([isinstance(message, m.CLOUD_SENDS)]) + block(header) + block(b"".join(body))


def _seeds() -> Iterator[bytes]:
    yield b"\0" + MAGIC
    yield b"\0" + MAGIC[:-1]
    yield b"\0" + MAGIC + _OPENING
    yield b"\0" + MAGIC + _OPENING[:-1]
    yield b"\0" + MAGIC + _OPENING[:-1] + b"\0"
    yield b"\0" + MAGIC + _OPENING[:20]
    yield b"\0" + MAGIC + b"".join(entry_of(Kind.FROM_EDGE, _SESSION, MESSAGES[0]))  # of a session that was not opened
    yield b"\0" + MAGIC + b"".join(entry_of(Kind.OPENED, _SESSION, MESSAGES[0]))
    for message in MESSAGES:
        yield b"\1" + _one(message)
    yield b"\1" + b"".join(map(_one, MESSAGES))


TARGET = Target(
    _run,
    _seeds,
    [
        recording_file.read_entries,
        recording_file._read_entry,
        recording_file.fault,
        traffic.read_traffic,
        traffic._Reader,
        traffic._call,
        traffic._answered,
        traffic._key,
        traffic._tensor,
    ],
    floor=0.7,
    max_len=8192,
    words=[MAGIC],
)
