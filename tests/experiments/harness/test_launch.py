"""The parts that benchmarks are made of."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from isthmus.common.errors import IsthmusError, PortInUseError
from isthmus.experiments.harness import launch
from isthmus.experiments.harness.launch import FIRST_PORT, LocalCloud, _of_session, free_ports

FAMILY = "sleep 300 & (sleep 300 & sleep 300) & wait"
"""A shell with a child, and another one whose child it is not."""


def test_a_kill_ends_every_process_of_a_cloud(tmp_path: Path) -> None:
    cloud = LocalCloud(tmp_path, "unused")
    with pytest.raises(IsthmusError, match="was not started"):
        cloud.kill()
    shell = cloud._process = subprocess.Popen(["sh", "-c", FAMILY], start_new_session=True)
    deadline = time.monotonic() + 20
    while len(_of_session(shell.pid)) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    cloud.kill()
    assert _of_session(shell.pid) == []
    assert shell.returncode == -9
    cloud.stop()  # there is nothing left to stop


def test_the_control_store_is_found_by_its_program(tmp_path: Path) -> None:
    cloud = LocalCloud(tmp_path, "unused")
    assert cloud.control_store() is None
    for program in ("raylet", "gcs_server"):
        command = [f"/some/{program}", "-c", "import time; time.sleep(300)", "--of=gcs_server"]
        process = cloud._process = subprocess.Popen(command, executable=sys.executable, start_new_session=True)
        while not Path(f"/proc/{process.pid}/cmdline").read_bytes():
            time.sleep(0.01)  # empty for a moment, while the program takes the place of the fork
        assert cloud.control_store() == (process.pid if program == "gcs_server" else None)
        cloud.kill()


def test_free_ports_are_in_a_row_and_nobody_listens_there(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = free_ports("127.0.0.1", 3)
    assert (second, third) == (first + 1, first + 2)
    with socket.create_server(("127.0.0.1", second)):
        drawn = iter((0, 1, 2))
        monkeypatch.setattr(launch.secrets, "randbelow", lambda most: first - FIRST_PORT + next(drawn))
        assert free_ports("127.0.0.1", 1) == [first]
        assert free_ports("127.0.0.1", 1) == [third]
        monkeypatch.setattr(launch.secrets, "randbelow", lambda most: first - FIRST_PORT)
        with pytest.raises(PortInUseError, match=r"no 3 free ports"):
            free_ports("127.0.0.1", 3)
