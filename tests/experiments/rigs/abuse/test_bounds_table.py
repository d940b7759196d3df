"""The tables of bounds in docs/security.md: each test that they name exists, and each attack stands in one of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from isthmus.experiments.rigs.abuse.attacks import ATTACKS
from isthmus.experiments.rigs.hostile_tenants import CONTROL

ROOT = Path(__file__).parents[4]
SECTION = re.search(r"^## Bounds\n(.*?)^## ", (ROOT / "docs" / "security.md").read_text(), re.MULTILINE | re.DOTALL)


def rows() -> list[tuple[Path, str]]:
    """The folder that a table's tests are in, and each of its rows."""
    assert SECTION is not None
    found, folder = [], ROOT
    for line in SECTION[1].splitlines():
        if head := re.search(r"\| test in `([a-z/]+)`", line):
            folder = ROOT / head[1]
        elif line.startswith("| ") and not line.startswith("|---"):
            own = re.search(r" in `(tests/[a-z/]+)`", line)  # a row may name a folder of its own
            found.append((ROOT / own[1] if own else folder, line))
    return found


def missing(folder: Path, row: str) -> list[str]:
    """Tests that a row names and that are not there."""
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", row)
    return [f"{file}::{name}" for file, name in named if not any(_has(path, name) for path in folder.rglob(file))]


def _has(path: Path, name: str) -> bool:
    return not name or f"\ndef {name}(" in path.read_text()


def test_every_bound_names_a_test_that_exists() -> None:
    assert len(rows()) > 20
    for folder, row in rows():
        assert "test_" in row, row
        assert missing(folder, row) == [], row


@pytest.mark.parametrize("row", ["`test_stranger.py::test_nothing`", "`test_none.py`"])
def test_a_test_that_is_not_there_is_noticed(row: str) -> None:
    assert missing(ROOT / "tests" / "cloud", row)


def test_every_attack_stands_in_a_table() -> None:
    named = {name for _, row in rows() for name in re.findall(r"`(\w+)`", row.rsplit("|", 2)[1])}
    assert set(ATTACKS) - {CONTROL} <= named
