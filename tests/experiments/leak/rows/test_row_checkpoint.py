"""What is kept of an unfinished row."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import Path

import pytest

from isthmus.common.errors import CheckpointError, OwnershipError
from isthmus.experiments.leak.rows.row_checkpoint import RowCheckpoint
from isthmus.privacy.measures.bootstrap import Interval

VALUE = Interval(0.5, 0.25, 0.75)


def never(*_: object) -> Interval:
    raise AssertionError("made again")


def result(checkpoint: RowCheckpoint, view: str = "known", made: Interval | None = VALUE) -> Interval:
    make = never if made is None else lambda: made
    return checkpoint.result("attack", {"view": view}, dict[str, Interval], lambda: {"found": make()})["found"]


def test_results_are_stored_by_their_settings_and_the_rows_texts(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "row"
    assert result(RowCheckpoint(folder, "texts")) == VALUE
    again = RowCheckpoint(folder, "texts")
    assert result(again, made=None) == VALUE
    assert isinstance(result(again, made=None), Interval)
    for other, view in ((again, "tuned"), (RowCheckpoint(folder, "other texts"), "known")):
        with pytest.raises(AssertionError, match="made again"):
            result(other, view, made=None)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_run_is_kept_when_it_is_whole(tmp_path: Path) -> None:
    def run(folder: Path, *, ends: bool = True) -> Iterable[Path]:
        assert not list(folder.iterdir())
        (folder / "kept").mkdir()
        (folder / "kept" / "file").write_text("whole")
        (folder / "key").write_text("secret")
        if not ends:
            raise KeyboardInterrupt
        return [folder / "kept"]

    checkpoint = RowCheckpoint(tmp_path / "row", "texts")
    with pytest.raises(KeyboardInterrupt):
        checkpoint.run(lambda folder: run(folder, ends=False))
    assert not (tmp_path / "row" / "run").exists()
    for texts in ("texts", "other texts"):  # with others it takes the place of the one before
        kept = RowCheckpoint(tmp_path / "row", texts).run(run)
        assert [path.name for path in kept.iterdir()] == ["kept"]

    def again(_: Path) -> Iterable[Path]:
        raise AssertionError("made again")

    assert (RowCheckpoint(tmp_path / "row", "other texts").run(again) / "kept" / "file").read_text() == "whole"


def test_the_seconds_are_those_of_what_was_asked_for(tmp_path: Path) -> None:
    result(RowCheckpoint(tmp_path / "row", "texts"))
    lines = (tmp_path / "row" / "results.jsonl").read_text()
    (tmp_path / "row" / "results.jsonl").write_text(lines.replace('"seconds": 0.0', '"seconds": 7.5'))
    checkpoint = RowCheckpoint(tmp_path / "row", "texts")
    assert checkpoint.seconds == 0
    result(checkpoint, made=None)
    result(checkpoint, made=None)
    assert checkpoint.seconds == 7.5


def test_what_is_damaged_or_open_to_others_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "row"
    result(RowCheckpoint(folder, "texts"))
    path = folder / "results.jsonl"
    path.write_text(path.read_text().replace("[0.5, 0.25, 0.75]", "null"))
    with pytest.raises(CheckpointError, match=r"results\.jsonl has no usable 'attack': remove this file"):
        result(RowCheckpoint(folder, "texts"), made=None)
    path.write_text('{"name": "attack"}\n')
    with pytest.raises(CheckpointError, match="line 1"):
        RowCheckpoint(folder, "texts")
    folder.chmod(0o777)
    with pytest.raises(OwnershipError):
        RowCheckpoint(folder, "texts")
