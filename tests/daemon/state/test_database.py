"""The database: what is committed stays, writers take turns, readers wait for nobody."""

from __future__ import annotations

import sqlite3
import threading
import traceback
from pathlib import Path

import pytest
from sqlalchemy import create_engine, select, text
from sqlalchemy.exc import IntegrityError, OperationalError

from isthmus.common.errors import DiskError
from isthmus.daemon.state import database as state_database
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.tables import Owner


def _owner(name: str) -> Owner:
    return Owner(id=name, name=name, token_sha256=name, created_at=0.0)


def test_what_a_block_has_committed_stays_and_what_raised_is_undone(tmp_path: Path) -> None:
    database = Database(tmp_path / "state.db")
    with database.session() as session:
        session.add(_owner("a"))

    def fail() -> None:
        with database.session() as session:
            session.add(_owner("b"))
            session.flush()
            raise KeyError("no")

    with pytest.raises(KeyError):
        fail()
    database.close()
    again = Database(tmp_path / "state.db")
    with again.reading() as session:
        assert [owner.name for owner in session.scalars(select(Owner))] == ["a"]
    again.close()


def test_threads_that_read_and_then_write_lose_nothing(tmp_path: Path) -> None:
    database = Database(tmp_path / "state.db")
    with database.session() as session:
        session.add(_owner("a"))

    def count() -> None:
        for _ in range(20):
            with database.session() as session:
                owner = session.get_one(Owner, "a")
                owner.created_at += 1

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.reading() as session:
        assert session.get_one(Owner, "a").created_at == 80
    database.close()


def test_two_databases_of_one_file_lose_nothing_either(tmp_path: Path) -> None:
    """As two processes have them."""
    ours, theirs = Database(tmp_path / "state.db"), Database(tmp_path / "state.db")
    with ours.session() as session:
        session.add(_owner("a"))

    def count(database: Database) -> None:
        for _ in range(20):
            with database.session() as session:
                session.get_one(Owner, "a").created_at += 1

    threads = [threading.Thread(target=count, args=(database,)) for database in (ours, theirs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with ours.reading() as session:
        assert session.get_one(Owner, "a").created_at == 40
    ours.close()
    theirs.close()


def test_a_reader_does_not_wait_for_a_writer_and_keeps_no_change(tmp_path: Path) -> None:
    database = Database(tmp_path / "state.db")
    with database.session() as session:
        session.add(_owner("a"))
    with database.session() as session:
        session.get_one(Owner, "a").created_at = 5.0
        session.flush()
        with database.reading() as reader:
            assert reader.get_one(Owner, "a").created_at == 0.0
    with database.reading() as reader:
        reader.get_one(Owner, "a").created_at = 7.0
        reader.flush()
    with database.reading() as reader:
        assert reader.get_one(Owner, "a").created_at == 5.0
    database.close()


def test_a_session_inside_another_one_is_refused_at_once(tmp_path: Path) -> None:
    database = Database(tmp_path / "state.db")

    def nested() -> None:
        with database.session(), database.session():
            pass

    with pytest.raises(RuntimeError, match="inside another"):
        nested()
    with database.session() as session:  # and the next one works
        session.add(_owner("a"))
    database.close()


@pytest.mark.parametrize("writes", [True, False])
def test_closing_waits_for_the_blocks_that_run_and_refuses_others(tmp_path: Path, writes: bool) -> None:
    database = Database(tmp_path / "state.db")
    begun, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def block() -> None:
        with database.session() if writes else database.reading() as session:
            session.execute(select(Owner))
            begun.set()
            go_on.wait()
            session.execute(select(Owner))

    def close() -> None:
        database.close()
        closed.set()

    threads = [threading.Thread(target=block), threading.Thread(target=close)]
    threads[0].start()
    begun.wait()
    threads[1].start()
    while not database._closed:
        pass
    with pytest.raises(RuntimeError, match="is closed"), database.reading():
        pass
    with pytest.raises(RuntimeError, match="is closed"), database.session():
        pass
    assert not closed.wait(0.05)
    go_on.set()
    for thread in threads:
        thread.join()
    assert database._engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_closing_inside_a_session_is_refused_at_once(tmp_path: Path) -> None:
    database = Database(tmp_path / "state.db")
    with pytest.raises(RuntimeError, match="inside one of its sessions"), database.session():
        database.close()
    with database.session() as session:
        session.add(_owner("a"))
    database.close()


def test_the_file_is_its_users_and_writes_reach_the_disk(tmp_path: Path) -> None:
    database = Database(tmp_path / "state.db")
    with database.reading() as session:
        pragma = {
            name: session.connection().exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert pragma == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    assert (tmp_path / "state.db").stat().st_mode & 0o777 == 0o600
    database.close()


def test_an_error_holds_no_value_of_a_statement(tmp_path: Path) -> None:
    database = Database(tmp_path / "state.db")
    with database.session() as session:
        session.add(_owner("planted-secret"))
    with pytest.raises(IntegrityError) as hidden, database.session() as session:
        session.add(_owner("planted-secret"))
    database.close()
    told = "".join(traceback.format_exception(hidden.value))
    assert "INSERT INTO owners" in told
    assert "planted-secret" not in told
    plain = create_engine(f"sqlite:///{tmp_path / 'state.db'}")  # without the option
    statement = text("INSERT INTO owners (id, name, token_sha256, created_at) VALUES (:id, :id, :id, 0)")
    with pytest.raises(IntegrityError, match="planted-secret"), plain.begin() as connection:
        connection.execute(statement, {"id": "planted-secret"})
    plain.dispose()


def test_a_full_disk_and_another_process_are_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_database, "BUSY_SECONDS", 0.01)
    database = Database(tmp_path / "state.db")
    with sqlite3.connect(tmp_path / "state.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DiskError, match="is in use by another process") as held, database.session() as session:
            session.execute(select(Owner))
        other.execute("ROLLBACK")
    other.close()
    with database.session() as session:
        session.execute(text(f"PRAGMA max_page_count={session.scalar(text('PRAGMA page_count'))}"))
    with pytest.raises(DiskError, match="free some space") as full, database.session() as session:
        session.add(_owner("large" * 100_000))
    for error in (held, full):
        assert "\n" not in str(error.value)
        assert "large" not in str(error.value)
    with database.session() as session:  # and a statement that is wrong is none of the disk's
        session.execute(text("PRAGMA max_page_count=100000"))
        with pytest.raises(OperationalError, match="no such table"):
            session.execute(text("SELECT * FROM missing"))
        session.add(_owner("later"))
    database.close()


@pytest.mark.long
def test_the_file_shrinks_when_much_was_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_database, "FREED_AT_ONCE", 100)
    database = Database(tmp_path / "state.db")

    def size() -> int:
        return sum(path.stat().st_size for path in tmp_path.glob("state.db*"))

    database.shrink()
    before = size()
    with database.session() as session:
        session.add_all(_owner(f"{number}" * 10_000) for number in range(200))
    database.shrink()
    assert size() > before + (2 << 20)  # the control: what is there stays
    with database.session() as session:
        session.execute(text("DELETE FROM owners"))
    database.shrink()
    assert size() < before + (1 << 16)
    with database.session() as session:
        session.add(_owner("later"))
    database.close()


def test_a_disk_that_is_full_while_the_file_shrinks_is_told_in_one_line(tmp_path: Path) -> None:
    database = Database(tmp_path / "state.db")
    with database._engine.connect() as connection:
        raw = connection.connection
        with pytest.raises(sqlite3.OperationalError, match="incomplete"):  # the control: a defect stays one
            database._run(raw, "")
        raw.cursor().execute("PRAGMA query_only=ON")
        with pytest.raises(DiskError, match="free some space"):
            database._run(raw, "user_version=1")
    database.close()
