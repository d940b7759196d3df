"""Processes of a measurement: questions and answers, errors that are passed on, and no process that stays."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from isthmus.common.errors import IsthmusError, UnreachableError
from isthmus.experiments.harness import processes
from isthmus.experiments.harness.processes import CommandFailedError, TaskProcess, run_isthmus, run_task

CHILD = "support.task_child"


@pytest.fixture(autouse=True)
def _child_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    tests = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((tests, os.environ.get("PYTHONPATH", ""))))


def child(**options: Any) -> TaskProcess:
    return TaskProcess("the child", CHILD, {"start": 3}, **options)


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def test_questions_are_answered_and_what_else_is_printed_is_no_answer() -> None:
    with child(threads=2) as process:
        assert process.answer() == {"start": 3, "threads": "2"}
        assert process.ask(["add", 4]) == 7
        process.send(["add", 5])
        assert process.answer() == 8
        process.finish()


def test_it_is_killed_at_the_end_of_the_block_whatever_it_does() -> None:
    with child() as process:
        process.answer()
        process.send(["sleep", 600])
    assert gone(process.pid)


def test_it_ends_when_nobody_has_questions() -> None:
    with child() as process:
        process.answer()
        process.finish(60)
        assert list(process.answers()) == []


@pytest.mark.parametrize(
    ("question", "reason"), [(["fail"], "DataError: no such thing"), (["crash"], "RuntimeError: a defect")]
)
def test_why_it_failed_is_passed_on(question: list[str], reason: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for options, where in (({}, ""), ({"log": log}, rf" \(its output is in {log}\)")):
        message = f"^the process of the child failed: {reason}{where}$"
        with child(**options) as process:
            process.answer()
            with pytest.raises(IsthmusError, match=message):
                process.ask(question)
    assert "printed by the child" in log.read_text()


def test_a_bad_end_is_an_error_and_a_killed_process_too() -> None:
    with child() as process:
        process.answer()
        process.send(["fail"])
        with pytest.raises(IsthmusError, match="ended with exit code 1: DataError"):
            process.finish()
    with child() as process:
        process.answer()
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(IsthmusError, match="ended with exit code -9"):
            process.finish()


def test_one_that_does_not_end_in_time_is_killed() -> None:
    with child() as process:
        process.answer()
        process.send(["sleep", 600])
        with pytest.raises(IsthmusError, match="ended with exit code -9"):
            process.finish(0.2)


def test_one_that_says_nothing_is_not_waited_for_longer_than_it_may_take() -> None:
    with child(patience=60.0) as process:
        process.answer()
    with child(patience=0.01) as process, pytest.raises(UnreachableError, match=r"said nothing for 0 s"):
        process.ask(["sleep", 600])


def test_a_task_that_ends_is_one_answer() -> None:
    assert run_task("the child", CHILD, {"once": 5}) == 5
    with pytest.raises(IsthmusError, match="failed: printed by the child"):
        run_task("the child", CHILD, {"silent": True})


def test_a_process_outlives_no_parent(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from isthmus.experiments.harness.processes import TaskProcess\n"
        f"process = TaskProcess('the child', {CHILD!r}, {{'start': 1}})\n"
        "process.answer()\n"
        "print(process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = processes.subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid, deadline = int(done.stdout), time.monotonic() + 60
    while not gone(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_command_that_fails_is_named() -> None:
    with pytest.raises(
        CommandFailedError, match=r"`isthmus edge eval …` ended with exit code 2; its own message is above"
    ) as failed:
        run_isthmus("edge", "eval", "--no-such-flag")
    assert failed.value.code == 2
