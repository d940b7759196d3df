"""Fixtures of the jobs' tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.daemon.jobs import scripted_worker
from support.daemon.jobs.job_homes import Jobs
from support.daemon.jobs.scripted_jobs import jobs_in

from isthmus.daemon.jobs import job_runner


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a script stand for each worker."""

    def started(words: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return popen([sys.executable, scripted_worker.__file__, words[-1]], **options)

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(job_runner, "TICK", 0.02)


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return jobs_in(tmp_path)
