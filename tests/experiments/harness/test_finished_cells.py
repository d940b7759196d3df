from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from isthmus.common.errors import CheckpointError
from isthmus.experiments.harness.finished_cells import Cells


def never() -> dict[str, Any]:
    raise AssertionError("made again")


def cells(path: Path) -> Cells:
    return Cells(path, Console(quiet=True))


def test_a_finished_result_is_found_by_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cells.jsonl"
    assert cells(path).get("one", {"seed": 0}, lambda: {"score": 1.5}) == {"score": 1.5}
    assert cells(path).get("one", {"seed": 0}, never) == {"score": 1.5}
    assert cells(path).get("one", {"seed": 1}, lambda: {"score": 2.5}) == {"score": 2.5}
    assert cells(path).get("two", {"seed": 1}, lambda: {"score": 3.5}) == {"score": 3.5}
    assert len(path.read_text().splitlines()) == 3


def test_a_line_that_was_cut_off_is_made_again_and_harms_no_other(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    for seed in range(2):
        cells(path).get("one", {"seed": seed}, lambda: {"score": seed})  # noqa: B023
    path.write_bytes(path.read_bytes()[:-9])
    reopened = cells(path)
    assert reopened.get("one", {"seed": 0}, never) == {"score": 0}
    assert reopened.get("one", {"seed": 1}, lambda: {"score": 7}) == {"score": 7}
    assert cells(path).get("one", {"seed": 1}, never) == {"score": 7}


def test_another_files_lines_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    path.write_text('{"name": "one"}\n')
    with pytest.raises(CheckpointError, match="line 1"):
        cells(path)
