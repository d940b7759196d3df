"""Rows of hidden states on disk, by key, within a bound: the memory of the span cache.

A folder of segment files, written one after another and only at their ends:

    000000.rows   opening: magic "ISTHROWS", the owner's identity (32 bytes)
                  record*: header (56 bytes, little-endian), then the row, as raw numbers
    header        magic "ROW1", key (32), dtype, rows, columns, CRC-32 of the row, CRC-32 of the header before this

There is no index file. Opening a folder walks over the headers; what a crash left half-written at a file's end is cut
off. A row whose checksum does not fit is forgotten and counts as absent, so nothing has to be synced to the disk.

**When the bound is reached, what is there stays and nothing more comes in.** Training reads all rows once in an epoch,
and under such access replacing the least recently used row is the worst choice: in a fixed order each row would be gone
just before it is wanted, and in a shuffled one a cache that holds half of the rows would find 15 % of them. A set that
stays finds the half that it holds, which is also the best that any rule can do in a fixed order.

**Privacy.** The rows are activations of private data, from which the text can be reconstructed by whoever has the
model. The folder is made with mode 0700 and the files with 0600, unencrypted; `clear` deletes them.
"""

from __future__ import annotations

import os
import struct
import threading
import warnings
import zlib
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from isthmus.common.errors import ConfigError, UnsupportedCallError
from isthmus.common.files import claim, disk_errors

KEY_BYTES = 32
SEGMENT_BYTES = 64 * 2**20

_OPENING = struct.Struct(f"<8s{KEY_BYTES}s")
_MAGIC = b"ISTHROWS"
_HEADER = struct.Struct(f"<4s{KEY_BYTES}sIIII")
_HEADER_SUM = struct.Struct("<I")
_ROW_MAGIC = b"ROW1"
_RECORD_BYTES = _HEADER.size + _HEADER_SUM.size

_DTYPES = {1: torch.float32, 2: torch.bfloat16, 3: torch.float16, 4: torch.float64}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What a store has done since it was opened, and what it holds.

    `hits` and `misses` count the rows that were asked for, `damaged` those among the misses that were on the disk and
    did not fit their checksum or their shape; `rows` and `bytes` are on the disk now, headers included. `full` says
    that a row was turned away because the bound is reached, `failed` that the disk could not be written.
    """

    hits: int
    misses: int
    damaged: int
    rows: int
    bytes: int
    full: bool
    failed: bool


class _Place(NamedTuple):
    """Where a row lies, and what it must be."""

    segment: int
    offset: int
    shape: tuple[int, int]
    dtype: torch.dtype
    checksum: int

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


class SpanStore:
    """An open folder of rows. Safe for several threads; one process has a folder at a time. Close it, or use `with`.

    Args:
        folder: Made if needed. Best one of its own.
        identity: Whose rows these are, 32 bytes. Rows of another owner are deleted on opening, since nobody would ask
            for them and they would take the place of others.
        max_bytes: Bound on the size of all files together. A folder that holds more is cut down to it.
        segment_bytes: Size at which another file is begun.

    Raises:
        ConfigError: Another process uses the folder, or an argument makes no sense.
        DiskError: The folder cannot be made, read or written.
        OwnershipError: The folder or something in it is another user's, or others may write to it.
    """

    def __init__(self, folder: Path, identity: bytes, *, max_bytes: int, segment_bytes: int = SEGMENT_BYTES) -> None:
        if max_bytes < 1 or len(identity) != KEY_BYTES:
            raise ConfigError(
                f"a span cache of {max_bytes} bytes for an identity of {len(identity)} bytes makes no sense: give at "
                f"least 1 byte and an identity of {KEY_BYTES}."
            )
        self.folder = folder
        self.identity = identity
        self._max_bytes, self._segment_bytes = max_bytes, segment_bytes
        self._index: dict[bytes, _Place] = {}
        self._sizes: dict[int, int] = {}  # of each segment file
        self._hits = self._misses = self._damaged = 0
        self._full = self._failed = False
        self._mutex = threading.Lock()
        with disk_errors(folder), ExitStack() as held:
            try:
                held.enter_context(claim(folder))
            except ConfigError:
                raise ConfigError(
                    f"another process uses the span cache {folder}: wait for it or stop it, or give another folder."
                ) from None
            self._open()
            self._held = held.pop_all()

    def close(self) -> None:
        """Let go of the folder, for another process to use."""
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._index)

    def stats(self) -> CacheStats:
        """Counters since the opening, and what is on the disk."""
        with self._mutex:
            return CacheStats(
                self._hits, self._misses, self._damaged, len(self._index), self._total(), self._full, self._failed
            )

    def get(self, key: bytes, shape: tuple[int, int] | None = None) -> Tensor | None:
        """The row of `key`, `[tokens, h]` on the CPU, with the values that `put` was given; None if it is not there.

        Its dtype may be narrower than what was put.

        Args:
            key: 32 bytes.
            shape: What the row must have, None for any. One that has another counts as damaged.
        """
        with self._mutex:
            place = self._index.get(key)
            fits = place is not None and shape in (None, place.shape)
            row = self._read(place) if place is not None and fits else None
            if row is None:
                self._misses += 1
                if self._index.pop(key, None) is not None:
                    self._damaged += 1
            else:
                self._hits += 1
            return row

    def put(self, key: bytes, row: Tensor) -> bool:
        """Keep a row.

        A row whose values are all bf16 numbers, as those that came over a strip with that codec, is kept as bf16.

        Args:
            key: 32 bytes.
            row: `[tokens, h]`, floating point.

        Returns:
            Whether it is kept now. False if it was there before, has no room, or the disk cannot be written, which is
            warned about once and ends the growing: a cache must not stop a training run.

        Raises:
            UnsupportedCallError: The row has another rank, or a dtype that is not floating point.
        """
        if row.dim() != 2 or row.dtype not in _CODES:
            raise UnsupportedCallError(
                f"the span cache keeps floating point rows of rank 2, not {row.dtype} of shape {list(row.shape)}"
            )
        with self._mutex:
            if key in self._index or self._failed:
                return False
            row = _narrowed(row.detach().cpu()).contiguous()
            payload = row.reshape(-1).view(torch.uint8).numpy().data
            segment = self._segment_for(_RECORD_BYTES + len(payload))
            if segment is None:
                self._full = True
                return False
            place = _Place(
                segment,
                self._sizes.get(segment, _OPENING.size) + _RECORD_BYTES,
                (row.shape[0], row.shape[1]),
                row.dtype,
                zlib.crc32(payload),
            )
            try:
                self._write(key, place, payload)
            except OSError as error:
                self._fail(segment, error)
                return False
            self._sizes[segment] = place.offset + place.nbytes
            self._index[key] = place
            return True

    def clear(self) -> None:
        """Delete every row, of this owner and of others.

        Raises:
            DiskError: A file cannot be deleted.
        """
        with self._mutex, disk_errors(self.folder):
            for path in self._files():
                path.unlink()
            self._index.clear()
            self._sizes.clear()
            self._full = self._failed = False

    # Files ------------------------------------------------------------------------------------------------------------

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.rows") if path.stem.isdecimal())

    def _path(self, segment: int) -> Path:
        return self.folder / f"{segment:06d}.rows"

    def _total(self) -> int:
        return sum(self._sizes.values())

    def _open(self) -> None:
        """Find out what is there; delete what is another owner's or beyond the bound."""
        for path in self._files():
            size = path.stat().st_size
            with path.open("r+b") as file:
                ours = file.read(_OPENING.size) == _OPENING.pack(_MAGIC, self.identity)
                if ours and self._total() + size <= self._max_bytes:
                    segment = int(path.stem)
                    self._sizes[segment] = self._scan(file, segment, size)
                    file.truncate(self._sizes[segment])
                    continue
            path.unlink()

    def _scan(self, file: Any, segment: int, size: int) -> int:
        """Enter a segment's records into the index; returns where the last whole one ends."""
        end = _OPENING.size
        while True:
            header = file.read(_RECORD_BYTES)
            place = _place(header, segment, end + _RECORD_BYTES)
            if place is None or place.offset + place.nbytes > size:
                return end
            end = file.seek(place.offset + place.nbytes)
            self._index[header[4 : 4 + KEY_BYTES]] = place

    def _segment_for(self, n: int) -> int | None:
        """The segment that `n` more bytes go to, or None where the bound leaves no room for them."""
        last = max(self._sizes, default=0)
        fits = self._sizes.get(last, _OPENING.size) + n <= self._segment_bytes
        # A row that is larger than a segment has one for itself.
        segment = last if fits or last not in self._sizes else last + 1
        opening = 0 if segment in self._sizes else _OPENING.size
        return segment if self._total() + opening + n <= self._max_bytes else None

    def _write(self, key: bytes, place: _Place, payload: memoryview) -> None:
        header = _HEADER.pack(_ROW_MAGIC, key, _CODES[place.dtype], *place.shape, place.checksum)
        header += _HEADER_SUM.pack(zlib.crc32(header))
        handle = os.open(self._path(place.segment), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if place.segment not in self._sizes:
                _write_at(handle, 0, _OPENING.pack(_MAGIC, self.identity))
            _write_at(handle, place.offset - _RECORD_BYTES, header)
            _write_at(handle, place.offset, payload)
        finally:
            os.close(handle)

    def _fail(self, segment: int, error: OSError) -> None:
        """Take back a write that did not succeed, and try no other."""
        self._failed = True
        with suppress(OSError):
            if segment in self._sizes:
                os.truncate(self._path(segment), self._sizes[segment])
            else:
                self._path(segment).unlink(missing_ok=True)
        warnings.warn(
            f"the span cache {self.folder} cannot be written ({error.strerror or error}) and takes in nothing more: "
            "what it lacks crosses the strip in every epoch. Free some space, or choose another folder.",
            stacklevel=3,
        )

    def _read(self, place: _Place) -> Tensor | None:
        raw = torch.empty(place.nbytes, dtype=torch.uint8)
        buffer = raw.numpy().data
        try:
            with self._path(place.segment).open("rb", buffering=0) as file:
                file.seek(place.offset)
                whole = _read_into(file, buffer)
        except OSError:
            return None
        if not whole or zlib.crc32(buffer) != place.checksum:
            return None
        return raw.view(place.dtype).view(place.shape)


def _place(header: bytes, segment: int, offset: int) -> _Place | None:
    """What a record's header says, or None if it is none."""
    if len(header) < _RECORD_BYTES:
        return None
    magic, _, code, rows, columns, checksum = _HEADER.unpack_from(header)
    intact = _HEADER_SUM.unpack_from(header, _HEADER.size)[0] == zlib.crc32(header[: _HEADER.size])
    if not intact or magic != _ROW_MAGIC or code not in _DTYPES:
        return None
    return _Place(segment, offset, (rows, columns), _DTYPES[code], checksum)


def _narrowed(row: Tensor) -> Tensor:
    """The same values as bf16, if they all are bf16 numbers; `row` itself if not."""
    narrow = row.to(torch.bfloat16)
    return narrow if torch.equal(narrow.to(row.dtype), row) else row


def _write_at(handle: int, offset: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


def _read_into(file: Any, buffer: memoryview) -> bool:
    """Fill `buffer`; whether there was enough to fill it."""
    done = 0
    while done < len(buffer):
        n = file.readinto(buffer[done:])
        if not n:
            return False
        done += n
    return True
