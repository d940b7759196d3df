"""The daemon's log: what is kept of it, and what is shown."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.common.errors import DiskError
from isthmus.daemon import daemon_log
from isthmus.daemon.daemon_log import KEPT, last_lines, logging_to, new_lines

log = logging.getLogger("isthmus.daemon.test")


@pytest.fixture(autouse=True)
def _no_cloud_s_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cloud that ran in this process has taken what is said under `isthmus` for itself."""
    monkeypatch.setattr(logging.getLogger("isthmus"), "propagate", True)


def test_what_is_said_goes_to_the_file_and_to_standard_error_where_it_is_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "daemon.log"
    with logging_to(file, to_stderr=True):
        log.info("one")
    with logging_to(file, to_stderr=False):
        log.warning("two")
        logging.getLogger("alembic.runtime").info("chatter")
    log.info("three")
    assert [line.split(" ", 3)[-1] for line in file.read_text().splitlines()] == ["one", "two"]
    told = capsys.readouterr().err
    assert "one" in told
    assert "two" not in told
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_client_can_neither_begin_a_line_nor_move_a_cursor(tmp_path: Path) -> None:
    file = tmp_path / "daemon.log"
    with logging_to(file, to_stderr=False):
        log.info("a path %s", "/x\n2026-01-01 00:00:00 ERROR forged \x1b[2J")
        try:
            raise KeyError("a defect")
        except KeyError:
            log.exception("failed")
    text = file.read_text()
    assert "\x1b" not in text
    lines = text.splitlines()
    assert "forged" in lines[0]
    assert lines[1].endswith("failed")
    assert lines[2].startswith("    Traceback")  # which has lines of its own


def test_a_traceback_forges_no_line(tmp_path: Path) -> None:
    file = tmp_path / "daemon.log"
    with logging_to(file, to_stderr=False):
        try:
            raise KeyError("never") from ValueError("x\n2026-01-01 00:00:00,000 ERROR forged\r\x1b[2J\u2028\x85\u202ex")
        except KeyError:
            log.exception("failed")
        log.info("after")
    text = file.read_text(encoding="utf-8")
    assert "forged" in text
    assert all(character.isprintable() or character == "\n" for character in text)
    assert [line.split()[-1] for line in text.splitlines() if not line.startswith("    ")] == ["failed", "after"]


def test_the_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_log, "MOST", 1000)
    file = tmp_path / "daemon.log"
    with logging_to(file, to_stderr=False):
        for number in range(200):
            log.info("line %d", number)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 1 + KEPT
    assert all(path.stat().st_size <= 1000 for path in files)
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert "line 199" in file.read_text()


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(DiskError, match="cannot be written"),
        logging_to(tmp_path / "nowhere" / "daemon.log", to_stderr=False),
    ):
        pass


def test_the_last_lines_go_back_to_the_file_before(tmp_path: Path) -> None:
    file = tmp_path / "daemon.log"
    assert last_lines(file, 3) == []
    file.with_name("daemon.log.1").write_text("1\n2\n3\n")
    file.write_text("4\n5\n")
    assert last_lines(file, 1) == ["5"]
    assert last_lines(file, 4) == ["2", "3", "4", "5"]
    assert last_lines(file, 0) == []


def test_following_begins_at_the_end_and_goes_on_in_the_next_file(tmp_path: Path) -> None:
    file = tmp_path / "daemon.log"
    file.write_text("before\n")

    def steps() -> Iterator[None]:
        with file.open("a") as more:
            more.write("one\n")
        yield
        with file.open("a") as more:
            more.write("two\n")
        file.rename(file.with_name("daemon.log.1"))
        file.write_text("three\n")
        yield

    said = steps()
    lines = new_lines(file, lambda _seconds: next(said))
    assert [next(lines) for _ in range(3)] == ["one", "two", "three"]
    lines.close()  # type: ignore[attr-defined]  # a generator


def test_following_waits_for_a_log_that_is_not_there_yet(tmp_path: Path) -> None:
    file = tmp_path / "daemon.log"
    assert next(new_lines(file, lambda _seconds: file.write_text("first\n") and None)) == "first"
