"""Migrations: they make the tables as they are declared, keep what is there, and refuse a newer release's database."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Column, MetaData, String, create_engine

from isthmus.common.errors import DiskError, StateError
from isthmus.daemon.state import migrate as module
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.migrate import MIGRATIONS, copy_of, migrate
from isthmus.daemon.state.tables import Table

NEXT = """
from alembic import op
import sqlalchemy as sa
revision = "{revision}"
down_revision = "{before}"
def upgrade():
    with op.batch_alter_table("owners") as table:
        table.add_column(sa.Column("colour", sa.String(), nullable=True))
    {then}
"""


def _differences(path: Path, metadata: MetaData) -> list[Any]:
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        found: list[Any] = compare_metadata(MigrationContext.configure(connection), metadata)
    engine.dispose()
    return found


def _ask(path: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(query).fetchall()


def _with_next(folder: Path, monkeypatch: pytest.MonkeyPatch, then: str = "") -> None:
    """Put one more migration behind those that there are."""
    head = _head()
    scripts = folder / "migrations"
    (scripts / "versions").mkdir(parents=True)
    for file in (MIGRATIONS / "env.py", *(MIGRATIONS / "versions").glob("v*.py")):
        (scripts / file.relative_to(MIGRATIONS)).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    text = NEXT.format(revision="9999", before=head, then=then)
    (scripts / "versions" / "v9999_next.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(module, "MIGRATIONS", scripts)


def _head() -> str:
    return max(file.name[1:5] for file in (MIGRATIONS / "versions").glob("v*.py"))


def _filled(path: Path) -> Path:
    migrate(path)
    _ask(path, "insert into owners (id, name, token_sha256, created_at) values ('a', 'a', 'a', 1)")
    return path


def test_the_migrated_schema_is_that_of_the_tables(tmp_path: Path) -> None:
    migrate(tmp_path / "state.db")
    assert _differences(tmp_path / "state.db", Table.metadata) == []


def test_a_table_that_no_migration_makes_is_noticed(tmp_path: Path) -> None:
    migrate(tmp_path / "state.db")
    more = MetaData()
    for table in Table.metadata.tables.values():
        table.to_metadata(more)
    more.tables["owners"].append_column(Column("colour", String))
    (difference,) = _differences(tmp_path / "state.db", more)
    assert difference[0] == "add_column"


def test_a_database_that_has_the_newest_schema_is_left_as_it_is(tmp_path: Path) -> None:
    path = _filled(tmp_path / "state.db")
    before = path.read_bytes()
    migrate(path)
    assert path.read_bytes() == before
    assert not copy_of(path).exists()


def test_a_migration_keeps_what_is_there_and_one_copy_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _filled(tmp_path / "state.db")
    copy_of(path).write_bytes(b"an older copy")
    _with_next(tmp_path, monkeypatch)
    migrate(path)
    assert _ask(path, "select id, colour from owners") == [("a", None)]
    assert _ask(copy_of(path), "select id, created_at from owners") == [("a", 1.0)]
    assert copy_of(path).stat().st_mode & 0o777 == 0o600
    assert sorted(file.name for file in tmp_path.glob("state.db*")) == ["state.db", "state.db.before"]


def test_a_copy_has_what_is_only_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a daemon that was killed leaves it."""
    path = tmp_path / "state.db"
    database = Database(path)
    with database.session() as session:
        session.connection().exec_driver_sql(
            "insert into owners (id, name, token_sha256, created_at) values ('b', 'b', 'b', 2)"
        )
    for name in ("state.db", "state.db-wal"):
        (tmp_path / "killed").mkdir(exist_ok=True)
        (tmp_path / "killed" / name).write_bytes((tmp_path / name).read_bytes())
    database.close()
    _with_next(tmp_path, monkeypatch)
    killed = tmp_path / "killed" / "state.db"
    migrate(killed)
    assert [row[0] for row in _ask(killed, "select id from owners")] == ["b"]
    assert [row[0] for row in _ask(copy_of(killed), "select id from owners")] == ["b"]


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _filled(tmp_path / "state.db")
    with monkeypatch.context() as patch:
        _with_next(tmp_path, patch, then="raise KeyError('half way')")
        with pytest.raises(KeyError):
            migrate(path)
    assert _ask(path, "select id, created_at from owners") == [("a", 1.0)]
    migrate(path)


def test_a_newer_releases_database_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _filled(tmp_path / "state.db")
    with monkeypatch.context() as patch:
        _with_next(tmp_path, patch)
        migrate(path)
    before = path.read_bytes()
    with pytest.raises(StateError, match=f"newer release .*9999.*{_head()}") as caught:
        Database(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"a text, and a long one at that. " * 100)
    with pytest.raises(StateError, match="is damaged"):
        Database(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DiskError):
        Database(tmp_path / "folder")
