"""Rows of hidden states on disk, by key, within a bound: the memory of the span cache.

    rows.bin       the rows as raw numbers, one behind the other
    index.sqlite   where each row lies, what it must be, and its checksum

A row is written before its entry in the index, and nothing waits for the disk: a row that a crash has lost does not fit
its checksum, which makes it a miss. SQLite's write-ahead log keeps the index whole. An index that is damaged all the
same is deleted with its rows, since they can be asked for again.

**When the bound is reached, what is there stays and nothing more comes in.** Training reads all rows once in an epoch,
and under such access replacing the least recently used row is the worst choice: in a fixed order each row would be gone
just before it is wanted, and in a shuffled one a cache that holds half of the rows would find 15 % of them. A set that
stays finds the half that it holds, which is also the best that any rule can do in a fixed order.

**Privacy.** The rows are activations of private data, from which the text can be reconstructed by whoever has the
model. The folder is made with mode 0700 and the files with 0600, unencrypted.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from isthmus.common.errors import ConfigError, DiskError, UnsupportedCallError
from isthmus.common.files import claim, disk_errors

KEY_BYTES = 32
ENTRY_BYTES = 160
"""What a row takes in the index at most, where pages of the index are half full."""

_ROWS = "rows.bin"
# What SQLite says of a damaged file may quote its bytes, which need not be UTF-8.
_SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)
_INDEX = "index.sqlite"
_LOG_PAGES = 256  # of 4 KiB, after which the write-ahead log is copied into the index
_SCHEMA = """
CREATE TABLE owner (identity BLOB NOT NULL);
CREATE TABLE rows (
    key BLOB PRIMARY KEY, dtype INTEGER, tokens INTEGER, columns INTEGER, start INTEGER, stop INTEGER, checksum INTEGER
) WITHOUT ROWID;
"""

_DTYPES = {1: torch.float32, 2: torch.bfloat16, 3: torch.float16, 4: torch.float64}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What a store has done since it was opened, and what it holds.

    `hits` and `misses` count the rows that were asked for, `damaged` those among the misses that were on the disk and
    did not fit their checksum or their shape; `rows` and `bytes` are on the disk now, `ENTRY_BYTES` for each row
    included. `full` says that a row was turned away because the bound is reached, `failed` that the disk could not be
    written.
    """

    hits: int
    misses: int
    damaged: int
    rows: int
    bytes: int
    full: bool
    failed: bool


class _Entry(NamedTuple):
    """What the index says of a row: a code of its dtype, its shape, where its bytes are, and their checksum."""

    dtype: int
    tokens: int
    columns: int
    start: int
    stop: int
    checksum: int


class SpanStore:
    """An open folder of rows. Safe for several threads; one process has a folder at a time. Close it, or use `with`.

    Args:
        folder: Made if needed. Best one of its own.
        identity: Whose rows these are, 32 bytes. Rows of another owner are deleted on opening, since nobody would ask
            for them and they would take the place of others.
        max_bytes: Bound on the rows and `ENTRY_BYTES` for each. A folder that holds more is cut down to it. Beyond the
            bound are the pages of an empty index (12 KiB) and, while the store is open, the log of the index (1 MiB).
        what: What messages call it.

    Raises:
        ConfigError: Another process uses the folder, or an argument makes no sense.
        DiskError: The folder cannot be made, read or written.
        OwnershipError: The folder or something in it is another user's, or others may write to it.
    """

    def __init__(self, folder: Path, identity: bytes, *, max_bytes: int, what: str = "span cache") -> None:
        if max_bytes < 1 or len(identity) != KEY_BYTES:
            raise ConfigError(
                f"a {what} of {max_bytes} bytes for an identity of {len(identity)} bytes makes no sense: give at "
                f"least 1 byte and an identity of {KEY_BYTES}."
            )
        self.folder = folder
        self.identity = identity
        self._what = what
        self._max_bytes = max_bytes
        self._hits = self._misses = self._damaged = 0
        self._full = self._failed = self._closed = False
        self._mutex = threading.Lock()
        with _disk_errors(folder), ExitStack() as held:
            try:
                held.enter_context(claim(folder))
            except ConfigError:
                raise ConfigError(
                    f"another process uses the {what} {folder}: wait for it or stop it, or give another folder."
                ) from None
            self._drop_older_format()
            self._file = os.open(folder / _ROWS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            held.callback(os.close, self._file)
            self._index = held.enter_context(closing(self._open_index()))
            self._rows, self._end = self._fit_to_bound()
            self._held = held.pop_all()

    def close(self) -> None:
        """Release the folder, for another process to use. After it no row is found or kept."""
        with self._mutex:
            self._closed = True  # the numbers of closed files may be other files' by now
            self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def stats(self) -> CacheStats:
        """Counters since the opening, and what is on the disk."""
        with self._mutex:
            used = self._end + self._rows * ENTRY_BYTES
            return CacheStats(self._hits, self._misses, self._damaged, self._rows, used, self._full, self._failed)

    def get(self, key: bytes, shape: tuple[int, int] | None = None) -> Tensor | None:
        """The row of `key`, `[tokens, h]` on the CPU, with the values that `put` was given; None if it is not there.

        Its dtype may be narrower than what was put.

        Args:
            key: 32 bytes.
            shape: What the row must have, None for any. One that has another counts as damaged.
        """
        with self._mutex:
            if self._closed:
                self._misses += 1
                return None
            try:
                entry = self._entry(key)
                row = None if entry is None else self._read(key, entry, shape)
                if entry is not None and row is None:
                    self._damaged += 1
                    self._rows -= self._index.execute("DELETE FROM rows WHERE key = ?", (key,)).rowcount
            except (*_SQLITE_ERRORS, OSError):
                row = None
                self._damaged += 1
            if row is None:
                self._misses += 1
            else:
                self._hits += 1
            return row

    def put(self, key: bytes, row: Tensor) -> bool:
        """Keep a row.

        A row whose values are all bf16 numbers, as those that came over a wire with that codec, is kept as bf16.

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
                f"the {self._what} keeps floating point rows of rank 2, not {row.dtype} of shape {list(row.shape)}"
            )
        with self._mutex:
            if self._failed or self._closed:
                return False
            row = _narrowed(row.detach().cpu()).contiguous()
            payload = row.reshape(-1).view(torch.uint8).numpy().data
            stop = self._end + len(payload)
            try:
                if self._entry(key) is not None:
                    return False
                if stop + (self._rows + 1) * ENTRY_BYTES > self._max_bytes:
                    self._full = True
                    return False
                shape = _CODES[row.dtype], row.shape[0], row.shape[1]
                entry = _Entry(*shape, self._end, stop, _checksum(key, *shape, payload))
                self._write(payload)
                self._index.execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?)", (key, *entry))
            except (*_SQLITE_ERRORS, OSError) as error:
                self._fail(error)
                return False
            self._rows, self._end = self._rows + 1, stop
            return True

    # The index --------------------------------------------------------------------------------------------------------

    def _drop_older_format(self) -> None:
        """Delete what versions before the index wrote: files `000000.rows`, `000001.rows`, …"""
        older = [path for path in self.folder.glob("*.rows") if path.stem.isdecimal()]
        for path in older:
            path.unlink()
        if older:
            warnings.warn(
                f"the {self._what} {self.folder} had rows of an older format, which are deleted: "
                "they are computed once more.",
                stacklevel=4,
            )

    def _open_index(self) -> sqlite3.Connection:
        """The index of this owner's rows; one that is damaged or another's is replaced by an empty one."""
        try:
            index = self._connect()
            if index is not None:
                return index
        except _SQLITE_ERRORS:
            pass  # it is deleted below
        for name in (_INDEX, f"{_INDEX}-wal", f"{_INDEX}-shm", f"{_INDEX}-journal"):
            (self.folder / name).unlink(missing_ok=True)
        index = self._connect()
        if index is None:
            raise DiskError(f"{self.folder / _INDEX} changes while it is opened: choose another folder.")
        return index

    def _connect(self) -> sqlite3.Connection | None:
        """Open the index, made where there is none; None where it is another owner's or damaged."""
        path = self.folder / _INDEX
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))  # its log gets this mode
        with ExitStack() as opened:
            index = opened.enter_context(closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)))
            for setting in (
                "locking_mode = EXCLUSIVE",
                "journal_mode = WAL",
                "synchronous = NORMAL",
                f"wal_autocheckpoint = {_LOG_PAGES}",
                "trusted_schema = OFF",
            ):
                index.execute(f"PRAGMA {setting}")
            if not index.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
                index.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
                index.execute("INSERT INTO owner VALUES (?)", (self.identity,))
            whole = (
                index.execute("PRAGMA quick_check(1)").fetchone() == ("ok",) and _schema_of(index) == _wanted_schema()
            )
            if not whole or index.execute("SELECT identity FROM owner").fetchall() != [(self.identity,)]:
                return None
            index.execute("UPDATE owner SET identity = identity")  # a damaged header can say that nobody may write
            opened.pop_all()
            return index

    def _fit_to_bound(self) -> tuple[int, int]:
        """Drop what a crash has left and what is beyond the bound; returns the number of rows and where they end."""
        size = os.fstat(self._file).st_size
        kept, end = 0, 0
        self._index.execute("DELETE FROM rows WHERE typeof(start) != 'integer' OR typeof(stop) != 'integer'")
        for start, stop in self._index.execute("SELECT start, stop FROM rows ORDER BY start, stop").fetchall():
            if not end <= start <= stop <= size or stop + (kept + 1) * ENTRY_BYTES > self._max_bytes:
                break
            kept, end = kept + 1, stop
        self._index.execute("DELETE FROM rows WHERE start < 0 OR stop > ?", (end,))
        os.truncate(self._file, end)
        return self._index.execute("SELECT count(*) FROM rows").fetchone()[0], end

    def _entry(self, key: bytes) -> _Entry | None:
        found = self._index.execute(
            "SELECT dtype, tokens, columns, start, stop, checksum FROM rows WHERE key = ?", (key,)
        ).fetchone()
        return None if found is None else _Entry(*found)

    # The rows ---------------------------------------------------------------------------------------------------------

    def _read(self, key: bytes, entry: _Entry, shape: tuple[int, int] | None) -> Tensor | None:
        """The row of an entry; None where the entry or the row is damaged, or has another shape."""
        if not all(isinstance(number, int) for number in entry) or entry.dtype not in _DTYPES:
            return None
        dtype, tokens, columns, start, stop, checksum = entry
        if shape not in (None, (tokens, columns)) or min(tokens, columns, start) < 0 or stop > self._end:
            return None
        if stop - start != tokens * columns * _DTYPES[dtype].itemsize:
            return None
        raw = torch.empty(stop - start, dtype=torch.uint8)
        buffer = raw.numpy().data
        if not _read_at(self._file, start, buffer) or _checksum(key, dtype, tokens, columns, buffer) != checksum:
            return None
        return raw.view(_DTYPES[dtype]).view(tokens, columns)

    def _write(self, payload: memoryview) -> None:
        offset = self._end
        while payload:
            written = os.pwrite(self._file, payload, offset)
            payload, offset = payload[written:], offset + written

    def _fail(self, error: Exception) -> None:
        """Take back a write that did not succeed, and try no other."""
        self._failed = True
        with suppress(OSError):
            os.truncate(self._file, self._end)
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        warnings.warn(
            f"the {self._what} {self.folder} cannot be written ({reason}) and takes in nothing more: "
            "what it lacks is computed anew in every epoch. Free some space, or choose another folder.",
            stacklevel=3,
        )


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn complaints of the operating system and of SQLite into `DiskError`."""
    with disk_errors(folder):
        try:
            yield
        except _SQLITE_ERRORS as error:
            raise OSError(str(error)) from error


def _schema_of(index: sqlite3.Connection) -> list[Any]:
    return index.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY name").fetchall()


def _wanted_schema() -> list[Any]:
    with closing(sqlite3.connect(":memory:")) as fresh:
        fresh.executescript(_SCHEMA)
        return _schema_of(fresh)


def _checksum(key: bytes, dtype: int, tokens: int, columns: int, payload: memoryview) -> int:
    """CRC-32 of a row and of what the index says of it."""
    return zlib.crc32(payload, zlib.crc32(key + f"{dtype} {tokens} {columns}".encode()))


def _narrowed(row: Tensor) -> Tensor:
    """The same values as bf16, if they all are bf16 numbers; `row` itself if not."""
    narrow = row.to(torch.bfloat16)
    return narrow if torch.equal(narrow.to(row.dtype), row) else row


def _read_at(file: int, offset: int, buffer: memoryview) -> bool:
    """Fill `buffer` from a place in a file; whether there was enough to fill it."""
    while buffer:
        n = os.preadv(file, [buffer], offset)
        if n == 0:
            return False
        buffer, offset = buffer[n:], offset + n
    return True
