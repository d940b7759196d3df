"""Bringing the database's file to this release's schema, by Alembic's migrations in `migrations/versions`."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.pool import NullPool

from isthmus.common.errors import StateError
from isthmus.common.files import disk_errors, locked, sync

MIGRATIONS = Path(__file__).parent / "migrations"


def copy_of(path: Path) -> Path:
    """Where the copy of a database is that was made before its last migration."""
    return path.with_name(f"{path.name}.before")


def migrate(path: Path) -> None:
    """Bring a database to the newest schema; one that has another is copied before, to `copy_of(path)`.

    One process does it at a time. A migration is done whole or not at all.

    Raises:
        StateError: The file is no database or damaged, or a newer release made it.
        DiskError: It cannot be written.
    """
    with locked(path):
        is_new = not path.exists()
        with disk_errors(path):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        with _opened(path) as engine:
            _migrate(engine, path, is_new=is_new)


def check_newest(path: Path) -> None:
    """See to it that a database, if there is one, has the newest schema; it is left as it is.

    Raises:
        StateError: It has another one, or is damaged.
        DiskError: It cannot be read.
    """
    if not path.exists():
        return
    with _opened(path) as engine:
        found = _revision(engine)
    if found != ScriptDirectory(str(MIGRATIONS)).get_current_head():
        raise StateError(
            f"{path} has the schema of another release ({found}): stop the daemon and start this release's, which "
            "brings it up to date"
        )


@contextmanager
def _opened(path: Path) -> Iterator[Engine]:
    engine = _engine(path)
    try:
        yield engine
    except OperationalError as error:
        with disk_errors(path):
            raise OSError(str(error.orig)) from error
    except DatabaseError as error:
        raise StateError(
            f"{path} is damaged ({error.orig}): put a copy in its place, or move it away to begin without jobs"
        ) from error
    finally:
        engine.dispose()


def _revision(engine: Engine) -> str | None:
    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def _migrate(engine: Engine, path: Path, *, is_new: bool) -> None:
    scripts = ScriptDirectory(str(MIGRATIONS))
    head = scripts.get_current_head()
    found = _revision(engine)
    if found == head:
        return
    if found is not None and found not in {script.revision for script in scripts.walk_revisions()}:
        raise StateError(
            f"{path} was made by a newer release (its schema is {found}, this one's {head}): use that release, or "
            "give another --home"
        )
    if not is_new:
        _copy(path, copy_of(path))
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _engine(path: Path) -> Engine:
    """An engine whose transactions hold changes of tables, too; and no foreign keys, for tables that are made anew."""
    engine = create_engine(
        f"sqlite:///{path}", connect_args={"timeout": 30.0}, poolclass=NullPool, hide_parameters=True
    )

    @event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA synchronous=FULL")
        if path.stat().st_size == 0:
            connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # for `Database.shrink`; later it changes nothing

    @event.listens_for(engine, "begin")
    def _begin(connection: object) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # type: ignore[attr-defined]

    return engine


def _copy(path: Path, target: Path) -> None:
    """Copy a database, with what is in its write-ahead log; an older copy is replaced."""
    temporary = target.with_name(f"{target.name}.new")
    with disk_errors(target):
        temporary.unlink(missing_ok=True)
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(temporary)) as copy:
            source.backup(copy)
        temporary.chmod(0o600)
        sync(temporary)
        temporary.replace(target)
        sync(target.parent)
