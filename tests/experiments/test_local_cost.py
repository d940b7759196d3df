"""The cost of local tuning: every kind is measured in a process of its own, and a failure of one is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny import tiny_checkpoint

from isthmus.backbone.errors import IsthmusError
from isthmus.experiments import local_cost
from isthmus.experiments.local_cost import KINDS, CostSettings, run_cost


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"))


def test_all_kinds_are_measured(model: Path, tmp_path: Path) -> None:
    settings = CostSettings(str(model), adapter_layers="1:1", batch=2, seq=16, rounds=1, threads=1)
    runs = run_cost(settings, tmp_path)["runs"]
    assert tuple(run["kind"] for run in runs) == KINDS
    for run in runs:
        assert run["tokens_per_s"] == pytest.approx(32 / run["step_s"])
        assert 0 < run["model_bytes"] < run["peak_bytes"]
        assert ("faster_than_lora_full" in run) == run["kind"].startswith("local")


def test_a_process_that_fails_says_why(model: Path, tmp_path: Path) -> None:
    settings = CostSettings(str(model), adapter_layers="1:1", threads=1)
    failing = local_cost._Worker("local_lora", settings, tmp_path / "gone")
    with failing, pytest.raises(IsthmusError, match=r"process of local_lora failed.*emulator\.json"):
        failing.wait_until_ready()
