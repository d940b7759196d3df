"""What a reboot does, but for the kernel: every process ends at once, and what they have left names other processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.daemon.jobs.scripted_daemon import CLOUD
from support.daemon.running_daemon import RunningDaemon, running_daemon

from isthmus.common.errors import NotRunningError
from isthmus.daemon.daemon_client import DaemonClient
from isthmus.daemon.daemon_lock import holder

pytestmark = pytest.mark.server

PARTS = "support.daemon.jobs.scripted_daemon"
SETTINGS = f"jobs_at_once = 2\n{CLOUD}"
STEP = {"step": 3, "total": 10, "speed": 0.5, "bytes_up": 100, "bytes_down": 200, "calls": 1, "retries": 0}
SCRIPT: tuple[dict[str, Any], ...] = (
    {"report": {"kind": "progress", **STEP}},
    {"wait": "before"},
    {"report": {"kind": "progress", **STEP, "step": 10}},
    {"result": "step\n"},
    {"end": {"outcome": "succeeded"}},
)


def _until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _jobs(daemon: RunningDaemon) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = daemon.get("/isthmus/v1/jobs").json()["jobs"]
    return sorted(found, key=lambda job: str(job["labels"]))


def _processes_of(pid: int) -> list[int]:
    """A process and all that it has started."""
    children: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        children |= {int(child) for child in path.read_text().split()}
    return [pid, *(each for child in children for each in _processes_of(child))]


def _kill_all(daemon: RunningDaemon) -> list[int]:
    """End all at once: none sees another one go, and none writes anything more."""
    found = _processes_of(daemon.process.pid)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in found:
            os.kill(pid, number)
    daemon.process.wait()
    return found


@pytest.mark.long
def test_jobs_go_on_after_all_processes_are_killed_at_once(tmp_path: Path) -> None:
    data = tmp_path / "script.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in SCRIPT))
    with running_daemon(tmp_path / "home", SETTINGS, PARTS) as daemon:
        client = DaemonClient(daemon.home)
        for name in ("a", "b", "c"):
            request = {"kind": "train", "model": "tiny", "spec": {"data": str(data)}, "labels": {"name": name}}
            client.post("/isthmus/v1/jobs", request)
        _until(lambda: [job["step"] for job in _jobs(daemon)] == [3, 3, 0])
        before, token = _jobs(daemon), daemon.token
        assert len(_kill_all(daemon)) == 3  # the daemon, and a process for each job that runs
        home = daemon.home
        assert home.socket.exists()
        assert not list(home.path.glob("jobs/*/end.json"))
        for path in home.path.glob("jobs/*/reports.jsonl"):
            with path.open("a") as reports:
                reports.write('{"kind": "progr')  # the disk has half a line
        # The numbers of its processes are others' now: this one has the lock's, and the record's.
        home.lock.write_text(str(os.getpid()))
        home.running.write_text(json.dumps({**json.loads(home.running.read_text()), "pid": os.getpid()}))
        assert holder(home) is None
        with pytest.raises(NotRunningError, match="no daemon runs"):
            client.get("/isthmus/v1/status")
        assert not list(home.path.glob("jobs/*/end.json"))  # nobody goes on without a daemon
    with running_daemon(tmp_path / "home", SETTINGS, PARTS) as again:
        assert holder(again.home) == again.process.pid
        assert again.token == token
        _until(lambda: _jobs(again)[2]["step"] == 3)  # the one that had not begun
        again.end(signal.SIGTERM)
    with running_daemon(tmp_path / "home", SETTINGS, PARTS) as last:
        _until(lambda: all(job["status"] == "succeeded" for job in _jobs(last)))
        jobs = _jobs(last)
    assert [job["id"] for job in jobs] == [job["id"] for job in before]
    assert [(job["step"], job["bytes_up"]) for job in jobs] == [(10, 300)] * 3  # each report counts once
    assert [job["attempts"] for job in jobs] == [2, 2, 2]


def test_what_is_left_of_one_process_would_be_noticed(tmp_path: Path) -> None:
    """The control: a process of the daemon's that lives on."""
    data = tmp_path / "script.jsonl"
    data.write_text(json.dumps({"wait": True}) + "\n")
    with running_daemon(tmp_path / "home", SETTINGS, PARTS) as daemon:
        request = {"kind": "train", "model": "tiny", "spec": {"data": str(data)}}
        DaemonClient(daemon.home).post("/isthmus/v1/jobs", request)
        _until(lambda: len(_processes_of(daemon.process.pid)) == 2)
        (_, worker) = _processes_of(daemon.process.pid)
        daemon.end(signal.SIGKILL)
        _until(lambda: bool(list(daemon.home.path.glob("jobs/*/end.json"))))  # it saw the daemon go, and says so
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
