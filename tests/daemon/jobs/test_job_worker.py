"""The process of a job, where it does not go as it should."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.common.errors import DataError, OverQuotaError, RefusedError, UnreachableError
from isthmus.common.shutdown import StopRequest, stop_asked
from isthmus.daemon.jobs import job_work, job_worker
from isthmus.daemon.jobs.kinds import Work
from isthmus.daemon.jobs.reports import Reporter, read_end, read_reports, write_end
from isthmus.edge.client.session_keeper import Wait

WORK = Work("ftjob-1", 2, "train", "tiny", {}, "models")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    WORK.write(tmp_path)
    return tmp_path


def ends(folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> dict[str, object]:
    """How the process of a job ends, whose work ends with this error."""

    def do(*_arguments: object) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(job_work, "do", do)
    code = job_worker._work(folder)
    end = read_end(folder, WORK.attempt)
    assert end is not None
    return {**end, "exit": code}


def test_what_it_ends_with_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ends(folder, monkeypatch, None) == {"attempt": 2, "outcome": "succeeded", "exit": 0}


def test_a_job_that_has_succeeded_is_not_done_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_end(folder, 1, "succeeded")
    assert ends(folder, monkeypatch, DataError("not reached")) == {"attempt": 1, "outcome": "succeeded", "exit": 0}
    write_end(folder, 1, "failed", code=11, message="before", passing=False)
    assert ends(folder, monkeypatch, None)["attempt"] == 2


def test_a_stop_is_told_apart_from_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ends(folder, monkeypatch, KeyboardInterrupt()) == {"attempt": 2, "outcome": "stopped", "exit": 130}


@pytest.fixture
def interruptible_here() -> Iterator[None]:
    """Handle SIGTERM as the process of a job does."""
    before = signal.signal(signal.SIGTERM, job_worker._interrupt)
    yield
    signal.signal(signal.SIGTERM, before)
    stop_asked.clear()


@pytest.mark.usefixtures("interruptible_here")
@pytest.mark.parametrize("error", [ModuleNotFoundError("numpy.dtypes"), DataError("x"), UnreachableError("x")])
@pytest.mark.parametrize("asked", ["signal", "request", None])
def test_a_job_that_was_asked_to_stop_has_not_failed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, asked: str | None
) -> None:
    def do(*_arguments: object) -> None:
        if asked == "signal":
            with contextlib.suppress(KeyboardInterrupt):  # as an import does that tells of something else
                signal.raise_signal(signal.SIGTERM)
        elif asked == "request":
            with StopRequest().listen(lambda _: None):
                signal.raise_signal(signal.SIGTERM)
        raise error

    monkeypatch.setattr(job_work, "do", do)
    code = job_worker._work(folder)
    end = read_end(folder, WORK.attempt)
    assert end is not None
    assert (end["outcome"], code == 130) == (("stopped", True) if asked else ("failed", False))


def test_a_stop_in_the_middle_of_an_import_is_a_stop(folder: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from importlib.abc import MetaPathFinder\n"
        "from isthmus.daemon.jobs import job_worker\n"
        "class Stops(MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'numpy.dtypes':\n"
        "            sys.meta_path.remove(self)\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Stops())\n"
        "job_worker.run_to_end(job_worker._main)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, folder], stdin=subprocess.PIPE) as process:
        assert process.wait(120) == 130
    end = read_end(folder, WORK.attempt)
    assert end is not None
    assert end["outcome"] == "stopped"


@pytest.mark.parametrize(
    ("error", "passing"),
    [(UnreachableError("x"), True), (OverQuotaError("x"), True), (RefusedError("x"), False), (DataError("x"), False)],
)
def test_errors_say_whether_another_time_may_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: DataError, passing: bool
) -> None:
    told = {"code": error.exit_code, "message": "x", "passing": passing, "exit": error.exit_code}
    assert ends(folder, monkeypatch, error) == {"attempt": 2, "outcome": "failed", **told}


def test_a_defect_is_told_in_a_line_and_logged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    end = ends(folder, monkeypatch, ZeroDivisionError("by zero"))
    assert (end["message"], end["code"]) == ("internal error: ZeroDivisionError: by zero", 1)
    assert "Traceback" in capsys.readouterr().err


def test_the_spec_is_its_users_alone(folder: Path) -> None:
    assert (folder / "spec.json").stat().st_mode & 0o777 == 0o600
    assert json.loads((folder / "spec.json").read_text())["attempt"] == 2


def test_a_job_says_once_that_it_waits_for_its_cloud(folder: Path) -> None:
    class Cloud:
        wait: Wait | None = None

    cloud: Any = Cloud()
    with Reporter(folder) as reporter:
        follower = job_work.Follower(WORK, object(), reporter)
        follower.tick()
        follower.link = cloud
        for wait in (None, None, Wait(1.0, 9.0, "broke"), Wait(1.0, 9.5, "x" * 900), None, Wait(2.0, 9.0, "y" * 900)):
            cloud.wait = wait
            follower.tick()
    told = [report for report in read_reports(folder, 0)[0] if report["kind"] == "waiting"]
    assert [(each["since"], each["until"]) for each in told] == [(None, None), (1.0, 9.0), (None, None), (2.0, 9.0)]
    assert [each["reason"] for each in told] == [None, "broke", None, "y" * 500]


def test_a_job_that_needs_its_cloud_no_more_does_not_wait_for_it(folder: Path) -> None:
    class Cloud:
        wait = Wait(1.0, 9.0, "broke")

    lost: Any = Cloud()
    with Reporter(folder) as reporter:
        follower = job_work.Follower(WORK, object(), reporter)
        follower.link = lost
        follower.tick()
        follower.link, follower.alone = None, True
        follower.tick()
        follower.tick()
    told = [report for report in read_reports(folder, 0)[0] if report["kind"] == "waiting"]
    assert [(each["since"], each["reason"]) for each in told] == [
        (1.0, "broke"),
        (None, "The job needs its cloud no more"),
    ]


def test_losses_of_batches_and_of_held_out_examples_are_told_apart(folder: Path) -> None:
    with Reporter(folder) as reporter:
        follower = job_work.Follower(WORK, object(), reporter)
        follower.began(0, 12, lambda folder: None, None)
        follower.evaluated(0, 3.5)
        for step, loss in ((5, 1.25), (10, 0.75)):
            follower.stepped({"step": step, "loss": loss}, 0.1)
            if step == 5:
                follower.evaluated(step, 2.5)
            follower.saved(step, lambda folder: None)
    told = read_reports(folder, 0)[0]
    assert [each["metrics"] for each in told if each["kind"] == "checkpoint"] == [
        {"step": 5, "train_loss": 1.25, "valid_loss": 2.5, "full_valid_loss": 2.5},
        {"step": 10, "train_loss": 0.75},
    ]
    held_out = [each["data"] for each in told if each["kind"] == "metrics" and "valid_loss" in each["data"]]
    assert [(data["step"], data["valid_loss"], data["total_steps"]) for data in held_out] == [
        (0, 3.5, 12),
        (5, 2.5, 12),
    ]


@pytest.mark.parametrize(
    ("call", "said"), [("job_worker.bound_process()", "Cannot allocate memory 4096"), ("", "whole ")]
)
def test_the_process_of_a_job_has_bounds_of_its_own(call: str, said: str) -> None:
    code = (
        "import mmap, resource\n"
        "from isthmus.daemon.jobs import job_worker\n"
        "job_worker.usable_memory = lambda: 1 << 30\n"
        f"{call}\n"
        "def taken():\n"
        "    try:\n"
        "        mmap.mmap(-1, 7 << 27, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "    except OSError as error:\n"
        "        return error.strerror\n"
        "    return 'whole'\n"
        "print(taken(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith(said)


def test_what_does_not_stop_is_ended() -> None:
    code = (
        "import signal, threading, time\n"
        "from isthmus.daemon.jobs import job_worker\n"
        "job_worker.STOP_SECONDS = 0.1\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "threading.Thread(target=job_worker._stop_at_end_of_input).start()\n"
        "time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, timeout=50, check=False)
    assert done.returncode == 130
