"""A step of tuning on a package over one of split training, from what the runs of both commands say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.emulator.packages import tiny_package
from support.models.tiny import tiny_checkpoint

from isthmus.common.errors import ConfigError
from isthmus.edge.training.edge_steps import COSTS_FILE
from isthmus.experiments.benchmarks import step
from isthmus.experiments.benchmarks.step import EPOCH, run_step, tuning_cost
from isthmus.experiments.harness.bench_settings import StepSettings

CLOUD: Any = SimpleNamespace(connection_file="connection", edge_key="key")


def test_the_first_step_is_left_out_and_rounds_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def command(*words: str) -> dict[str, Any]:
        ran.append(words[0])
        slow = 1 + len(ran) // 3  # the second round's steps take twice as long: of both, so the ratio stays
        epochs = ([2.0] * EPOCH, [2.0] * EPOCH) if words[0] == "edge" else ([1.0] * EPOCH, [0.5] * EPOCH)
        seconds = [100.0, *epochs[0][1:], *epochs[1]]
        options = dict(zip(words[2::2], words[3::2], strict=True))
        assert options["--steps"] == str(2 * EPOCH)
        texts = Path(options["--data"]).read_text().splitlines()
        assert len({json.loads(line)["text"] for line in texts}) == EPOCH * 2  # two epochs, and no text twice in one
        out = Path(options["--out"])
        out.mkdir()
        (out / COSTS_FILE).write_text("".join(f"{json.dumps({'seconds': slow * each})}\n" for each in seconds))
        return {}

    monkeypatch.setattr(step, "run_isthmus", command)
    found = tuning_cost(StepSettings(batch=2, seq=8, package=tmp_path / "package", rounds=2), tmp_path, CLOUD)
    assert ran == ["emulator", "edge", "edge", "emulator"]
    assert (found["first_epoch"]["median"], found["first_epoch"]["max"]) == (0.5, 0.5)
    assert (found["later_epochs"]["median"], found["later_epochs"]["min"]) == (0.25, 0.25)
    assert [each["split_step_s"] for each in found["rounds"]] == [2.0, 4.0]
    assert found["split_step_s"] == 3.0


def test_a_package_without_advice_is_refused_before_a_cloud_starts(tmp_path: Path) -> None:
    tiny_package(tmp_path / "package", tiny_checkpoint("llama", tmp_path / "model"))
    settings = StepSettings(model=str(tmp_path / "model"), package=tmp_path / "package")
    with pytest.raises(ConfigError, match="no advice for tuning: build one with --preset"):
        run_step(settings, tmp_path / "bench")
    assert not (tmp_path / "bench").exists()
