"""Segments of the span cache: a folder's files, raw, or of records whose headers' checksums fit."""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from fuzz.target import Cursor, Target, block, scratch

from isthmus.edge.span_cache import cache_store
from isthmus.edge.span_cache.cache_store import SpanStore

OWNER = bytes(32)
BOUND = 1 << 14
_ROW = torch.arange(6, dtype=torch.float32).view(2, 3)


@functools.cache
def _folder() -> Path:
    return scratch()


def _run(data: bytes) -> None:
    folder, script = _folder(), Cursor(data)
    for path in folder.glob("*.rows"):
        path.unlink()
    (folder / "000000.rows").write_bytes(_segment(script))
    if script:
        (folder / "000003.rows").write_bytes(_segment(script))
    with SpanStore(folder, OWNER, max_bytes=BOUND, segment_bytes=1 << 10) as store:
        for key in list(store._index):
            row = store.get(key)
            if row is not None and (row.dim() != 2 or row.nbytes > BOUND):
                raise AssertionError(f"a row of shape {tuple(row.shape)} was read")
        key = b"new".ljust(32, b"\0")
        before = store.get(key)
        kept = store.put(key, _ROW)
        if kept and not torch.equal(store.get(key).to(torch.float32), _ROW):  # type: ignore[union-attr]
            raise AssertionError("another row is read than was kept")
        if before is None and not kept and not store.stats().full:
            raise AssertionError("a row is not kept though there is room")
        there = sum(path.stat().st_size for path in folder.glob("*.rows"))
        if there > BOUND or there != store.stats().bytes:
            raise AssertionError(f"{there} bytes are on the disk, {store.stats().bytes} are counted")


def _segment(script: Cursor) -> bytes:
    """A file's bytes: raw, or the opening and records, each of which may claim what it likes under good checksums."""
    if script.number() & 1:
        return script.block()
    parts = [cache_store._OPENING.pack(cache_store._MAGIC, OWNER)]
    for _ in range(script.number() % 8):
        flags, code, rows, columns = script.number(), script.number(), script.number("I"), script.number("I")
        row = script.block()
        checksum = zlib.crc32(row) ^ (flags & 1)
        header = cache_store._HEADER.pack(b"ROW1", script.take(8).ljust(32, b"\0"), code, rows, columns, checksum)
        parts += header, struct.pack("<I", zlib.crc32(header) ^ (flags >> 1 & 1)), row
    return b"".join(parts)


def _record(code: int, rows: int, columns: int, row: bytes, flags: int = 0) -> bytes:
    return struct.pack("<BBII", flags, code, rows, columns) + block(row) + b"12345678"


def _seeds() -> Iterator[bytes]:
    good = _record(1, 2, 1, bytes(8)) + _record(2, 1, 4, bytes(8))
    yield b"\0\2" + good
    yield b"\0\2" + good + b"\0\1" + _record(4, 1, 1, bytes(8))
    yield b"\0\1" + _record(1, 2, 1, bytes(8), 1)
    yield b"\0\1" + _record(1, 2, 1, bytes(8), 2)
    yield b"\0\1" + _record(1, 0xFFFFFFFF, 0xFFFFFFFF, bytes(8))
    yield b"\0\1" + _record(1, 0, 0xFFFFFFFF, b"")
    yield b"\0\1" + _record(9, 1, 1, bytes(4))
    yield b"\1" + block(cache_store._OPENING.pack(cache_store._MAGIC, b"\1" * 32) + bytes(100))
    yield b"\1" + block(b"")


TARGET = Target(
    _run,
    _seeds,
    [SpanStore._open, SpanStore._scan, SpanStore._read, SpanStore.get, cache_store._place, cache_store._read_into],
    floor=0.85,
    words=[b"ROW1"],
)
