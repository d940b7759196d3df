from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.daemon.state.database import Database


@pytest.fixture(autouse=True)
def _databases_are_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close what a test has opened: a connection that is left to the garbage collector is a warning."""
    opened: list[Database] = []
    init = Database.__init__

    def noting(self: Database, path: Path) -> None:
        init(self, path)
        opened.append(self)

    monkeypatch.setattr(Database, "__init__", noting)
    yield
    for database in opened:
        database.close()
