"""What a worker tells, and what is read of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isthmus.daemon.jobs import reports
from isthmus.daemon.jobs.reports import REPORTS, Reporter, read_end, read_reports, write_end


def kinds(found: list[dict[str, object]]) -> list[object]:
    return [report["kind"] for report in found]


def test_what_is_told_is_read_once(tmp_path: Path) -> None:
    with Reporter(tmp_path) as reporter:
        reporter.tell("message", message="one")
        found, place = read_reports(tmp_path, 0)
        assert found[0].pop("at")
        assert found == [{"kind": "message", "message": "one"}]
        assert read_reports(tmp_path, place) == ([], place)
        reporter.tell("progress")
    assert kinds(read_reports(tmp_path, place)[0]) == ["progress"]


def test_half_a_line_counts_for_nothing(tmp_path: Path) -> None:
    with Reporter(tmp_path) as reporter:
        reporter.tell("first")
    with (tmp_path / REPORTS).open("a") as file:
        file.write('{"kind": "ha')
    found, place = read_reports(tmp_path, 0)
    assert kinds(found) == ["first"]
    with Reporter(tmp_path) as reporter:  # the next worker's
        reporter.tell("second")
    assert kinds(read_reports(tmp_path, place)[0]) == ["second"]


def test_reports_are_read_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "BYTES_AT_ONCE", 150)
    with Reporter(tmp_path) as reporter:
        for number in range(7):
            reporter.tell(f"report {number}")
    found, place = [], 0
    while True:
        some, end = read_reports(tmp_path, place)
        if end == place:
            break
        assert len(some) <= 3
        found, place = [*found, *some], end
    assert kinds(found) == [f"report {number}" for number in range(7)]


def test_there_may_be_no_reports_yet(tmp_path: Path) -> None:
    assert read_reports(tmp_path, 0) == ([], 0)


@pytest.mark.parametrize(
    ("written", "attempt", "outcome"),
    [
        ({"attempt": 2, "outcome": "failed"}, 2, "failed"),
        ({"attempt": 1, "outcome": "failed"}, 2, None),
        ({"attempt": 1, "outcome": "succeeded"}, 2, "succeeded"),
    ],
)
def test_an_end_is_that_of_its_attempt_and_success_is_for_good(
    tmp_path: Path, written: dict[str, object], attempt: int, outcome: str | None
) -> None:
    (tmp_path / "end.json").write_text(json.dumps(written))
    end = read_end(tmp_path, attempt)
    assert (end and end["outcome"]) == outcome


def test_an_end_that_is_missing_or_damaged_is_none(tmp_path: Path) -> None:
    assert read_end(tmp_path, 1) is None
    (tmp_path / "end.json").write_text("{")
    assert read_end(tmp_path, 1) is None
    write_end(tmp_path, 1, "stopped")
    assert read_end(tmp_path, 1) == {"attempt": 1, "outcome": "stopped"}
