"""The structured log."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.cloud.telemetry import logs


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


PROCESS = """
import sys
from pathlib import Path
from isthmus.cloud.telemetry import logs
logs.LOG_BYTES = 4096
logs.log_to(logs.log_file(Path(sys.argv[1]), "worker", int(sys.argv[2])))
for number in range(60):
    logs.log("event", process=int(sys.argv[2]), number=number)
"""


def test_processes_that_rotate_at_once_lose_no_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS, str(tmp_path)]
    processes = [subprocess.Popen([*command, str(number)]) for number in range(3)]
    assert [process.wait() for process in processes] == [0] * 3
    for number, name in enumerate(("worker.log", "worker-1.log", "worker-2.log")):
        files = [tmp_path / f"{name}.1", tmp_path / name]
        lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        assert [(line["process"], line["number"]) for line in lines] == [(number, each) for each in range(60)]
        assert [file.stat().st_mode & 0o777 for file in files] == [0o600] * 2
