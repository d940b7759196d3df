"""The cost of local tuning: every kind is measured in a process of its own, and a failure of one is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.models.tiny import tiny_checkpoint

from isthmus.common.errors import IsthmusError
from isthmus.experiments.harness.emulator_settings import LocalCostSettings
from isthmus.experiments.harness.processes import TaskProcess
from isthmus.experiments.offsite.local_cost import KINDS, run_cost

pytestmark = pytest.mark.usefixtures("warm_children")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"))


def test_all_kinds_are_measured(model: Path, tmp_path: Path) -> None:
    settings = LocalCostSettings(str(model), adapter_layers="1:1", batch=2, seq=16, rounds=1, threads=1)
    runs = run_cost(settings, tmp_path)["runs"]
    assert tuple(run["kind"] for run in runs) == KINDS
    for run in runs:
        assert run["tokens_per_s"] == pytest.approx(32 / run["step_s"])
        assert 0 < run["model_bytes"] < run["peak_bytes"]
        assert ("faster_than_lora_full" in run) == run["kind"].startswith("local")


def test_a_process_that_fails_says_why(model: Path, tmp_path: Path) -> None:
    settings = LocalCostSettings(str(model), adapter_layers="1:1", threads=1)
    task = dataclasses.asdict(settings) | {"kind": "local_lora", "emulator": str(tmp_path / "gone")}
    failing = TaskProcess("local_lora", "isthmus.experiments.offsite.local_cost", task, threads=1)
    with failing, pytest.raises(IsthmusError, match=r"process of local_lora failed.*emulator\.json"):
        failing.answer()
