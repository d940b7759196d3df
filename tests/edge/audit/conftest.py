"""A run that audits look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cloud.train_runs import Runs


@pytest.fixture(scope="module")
def honest_run(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at an honest cloud, every call of which was kept."""
    out = tmp_path_factory.mktemp("honest") / "run"
    runs.train(out, audit_sample=64)
    return out
