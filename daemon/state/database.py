"""The SQLite database: opened with WAL, brought to the newest schema, and used by several threads and processes."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, PoolProxiedConnection, create_engine, event
from sqlalchemy.orm import Session, sessionmaker

from isthmus.common.errors import DiskError
from isthmus.daemon.state.migrate import migrate

BUSY_SECONDS = 30.0
"""So long a transaction waits for one of another process."""
FREED_AT_ONCE = 4096
"""Pages that one transaction gives back to the disk."""

_HELD = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_DISK = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN})


class Database:
    """The daemon's database. What a session has committed survives a crash of the machine.

    Errors hold no values of a statement, which may be anybody's data. Whatever reads or writes raises DiskError where
    the disk is full or fails, or another process holds the file for too long.

    Args:
        path: The file, made where there is none.

    Raises:
        StateError: The file is damaged, or of a newer release.
        DiskError: It cannot be written.
    """

    def __init__(self, path: Path) -> None:
        migrate(path)
        self._path = path
        self._engine = create_engine(
            f"sqlite:///{path}", connect_args={"timeout": BUSY_SECONDS}, pool_timeout=60, hide_parameters=True
        )
        event.listen(self._engine, "connect", _prepare)
        event.listen(self._engine, "begin", _begin)
        event.listen(self._engine, "handle_error", lambda context: self._check_disk(context.original_exception))
        self._sessions = sessionmaker(self._engine, expire_on_commit=False)
        self._readers = sessionmaker(
            self._engine.execution_options(isthmus_reads=True), expire_on_commit=False, autoflush=False
        )
        self._writing = threading.Lock()
        self._writer: int | None = None
        self._blocks = threading.Condition()
        self._open_blocks, self._closed = 0, False

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A session whose changes are committed when the block ends, and undone when it raises.

        There is one at a time: the block begins once the others have ended, so what it reads is what it changes. Keep
        it short, and wait for nothing in it.

        Raises:
            RuntimeError: This thread is in such a block already: a defect, which would wait for itself. Or the database
                is closed.
        """
        if self._writer == threading.get_ident():
            raise RuntimeError("a session of the database inside another one, on the same thread")
        with self._block(), self._writing:
            self._writer = threading.get_ident()
            try:
                with self._sessions.begin() as session:
                    yield session
            finally:
                self._writer = None

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that sees the database as it is when the block begins. It waits for nobody and keeps no change.

        Raises:
            RuntimeError: The database is closed.
        """
        with self._block(), self._readers() as session:
            yield session

    def shrink(self) -> None:
        """Give what the file no longer needs back to the disk, some at a time, so that others write in between."""
        left, before = self._free_pages(), -1
        while left and left != before:
            before = left
            with self.session() as session:
                # SQLAlchemy reads no rows without columns, of which each is a page that is freed.
                self._run(session.connection().connection, f"incremental_vacuum({FREED_AT_ONCE})")
            left = self._free_pages()
        with self._block(), self._writing, closing(self._engine.raw_connection()) as connection:
            self._run(connection, "wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Close all connections once the blocks that run have ended; no further one begins.

        Raises:
            RuntimeError: This thread is in a block that writes: a defect, which would wait for itself.
        """
        if self._writer == threading.get_ident():
            raise RuntimeError("the database is closed inside one of its sessions, on the same thread")
        with self._blocks:
            self._closed = True
            self._blocks.wait_for(lambda: self._open_blocks == 0)
        self._engine.dispose()

    def _free_pages(self) -> int:
        with self.reading() as session:
            return int(session.connection().exec_driver_sql("PRAGMA freelist_count").scalar_one())

    @contextmanager
    def _block(self) -> Iterator[None]:
        """Count a block, for whoever closes the database."""
        with self._blocks:
            if self._closed:
                raise RuntimeError(f"{self._path} is closed: a block that begins now is a defect")
            self._open_blocks += 1
        try:
            yield
        finally:
            with self._blocks:
                self._open_blocks -= 1
                self._blocks.notify_all()

    def _run(self, connection: PoolProxiedConnection, pragma: str) -> None:
        try:
            connection.cursor().execute(f"PRAGMA {pragma}").fetchall()
        except sqlite3.OperationalError as error:
            self._check_disk(error)
            raise

    def _check_disk(self, error: BaseException) -> None:
        if not isinstance(error, sqlite3.OperationalError):
            return
        code = error.sqlite_errorcode & 0xFF  # the rest says where it happened
        if code in _HELD:
            raise DiskError(f"{self._path} is in use by another process ({error}): end that one, or ask again later")
        if code in _DISK:
            raise DiskError(f"{self._path} cannot be written ({error}): free some space, and see to it that it may be")


def _prepare(connection: sqlite3.Connection, _record: Any) -> None:
    """Set up a new connection. Transactions begin where `_begin` says, not where Python's driver would."""
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    """Begin a transaction: one that may write takes its turn now, since SQLite lets no reader become a writer late."""
    reads = connection.get_execution_options().get("isthmus_reads", False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
