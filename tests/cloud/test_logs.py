"""The structured log."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.cloud import logs


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = logs.LOGGER.handlers[:], logs.LOGGER.level, logs.LOGGER.propagate
    yield
    for handler in logs.LOGGER.handlers:
        if handler not in before[0]:
            handler.close()
    logs.LOGGER.handlers[:], logs.LOGGER.propagate = before[0], before[2]
    logs.LOGGER.setLevel(before[1])


def test_a_log_grows_no_further_than_its_bound_whatever_strangers_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "LOG_BYTES", 4096)
    logs.log_to(tmp_path / "worker.log")
    for number in range(1000):
        logs.log("session_refused", outcome="abandoned", number=number)
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["worker.log", "worker.log.1"]
    assert all((tmp_path / name).stat().st_size <= 4096 for name in files)
    assert json.loads((tmp_path / "worker.log").read_text().splitlines()[-1])["number"] == 999


def test_what_other_folders_warn_of_is_in_the_log(tmp_path: Path) -> None:
    logs.log_to(tmp_path / "worker.log")
    logging.getLogger("isthmus.kernels").warning("torch computes on %s", "cuda:0")
    (line,) = map(json.loads, (tmp_path / "worker.log").read_text().splitlines())
    assert (line["level"], line["event"]) == ("warning", "torch computes on cuda:0")
