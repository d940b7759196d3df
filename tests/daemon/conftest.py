"""What tests of the daemon leave behind in their process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.daemon.state.database import Database


@pytest.fixture(autouse=True)
def closed_databases(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close the databases that a test and its own fixtures have opened, once all else of them has ended."""
    made: list[Database] = []
    begin = Database.__init__

    def begun(database: Database, path: Path) -> None:
        begin(database, path)
        made.append(database)

    monkeypatch.setattr(Database, "__init__", begun)
    yield
    for database in made:
        database.close()
