"""A worker's process: how it ends where it cannot start, and what it imports."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from isthmus.cloud.control import worker as worker_module
from isthmus.cloud.control.worker import Worker, WorkerSpec
from isthmus.common.errors import ConfigError, PortInUseError

SPEC = WorkerSpec("", "tiny", "2:2", "fp32", "", "", "127.0.0.1:0", 1, 1, 1, "")


def test_a_restarted_worker_that_cannot_start_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PortInUseError("taken")

    monkeypatch.setattr(Worker, "_start", fail)
    monkeypatch.setattr(worker_module, "RESTART_PAUSE", 0.0)
    with pytest.raises(PortInUseError, match="taken"):
        Worker(SPEC).port()  # a first start tells whoever started it
    monkeypatch.setattr(worker_module, "was_restarted", lambda: True)
    codes: list[int] = []
    monkeypatch.setattr(worker_module.os, "_exit", codes.append)
    Worker(SPEC)
    assert codes == [1]


def test_a_worker_that_must_wipe_and_does_not_says_so_to_whoever_started_it() -> None:
    with pytest.raises(ConfigError, match="--wipe-freed cannot work here"):
        Worker(dataclasses.replace(SPEC, wipe_freed=True)).port()


def test_a_process_that_only_has_handles_of_workers_needs_no_torch() -> None:
    modules = ("controller", "worker", "cluster", "ray_cluster", "supervisor")
    asked = (
        "import importlib, sys\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(f'isthmus.cloud.control.{name}')\n"
        "    print(name, *{'torch', 'transformers', 'grpc'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(modules)  # each alone: nothing heavy stands behind its name
