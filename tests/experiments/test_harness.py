"""The parts that benchmarks are made of."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from isthmus.backbone.errors import IsthmusError
from isthmus.experiments.harness import LocalCloud, _of_session

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
