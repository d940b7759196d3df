"""The placement benchmark: what has to be equal is, what is cached does not cross, finished runs are kept."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.cloud.train_runs import Runs, cloud_for_runs
from support.models.small_tasks import task_folder

from isthmus.backbone.checkpoints.sources import load_tokenizer, resolve
from isthmus.common.errors import IsthmusError
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.experiments.harness.finished_cells import Cells
from isthmus.experiments.placements import placement_scores
from isthmus.experiments.placements.placement_costs import EPOCH_STEPS, CostSettings, measure_cost
from isthmus.experiments.placements.placement_modes import MODES, Mode
from isthmus.experiments.placements.placement_scores import Regime, Scorer
from isthmus.experiments.precision.codec_bench import measure_cosines
from isthmus.experiments.scoring.tasks import Sizes, load_task

pytestmark = pytest.mark.usefixtures("warm_children")

LAYERS = 6


@dataclass(frozen=True)
class Cloud:
    connection: str
    edge_key: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with cloud_for_runs(tmp_path_factory.mktemp("bench"), layers=LAYERS) as started:
        yield started


@pytest.fixture
def cloud(runs: Runs) -> Cloud:
    return Cloud(runs.server.address, runs.server.home.key_file)


@pytest.fixture
def settings(runs: Runs) -> CostSettings:
    shared = {"rank": 2, "taps": 2, "reduction": 2}
    return CostSettings(str(runs.model), "1:1", shared, 0.1, batch=2, seq=16, rounds=EPOCH_STEPS, steps=200, threads=1)


@pytest.mark.parametrize(("targets", "groups"), [({}, 1), ({"target_modules": "q_proj,o_proj"}, 2)])
def test_sites_on_the_edge_equal_one_process_bit_for_bit(
    targets: dict[str, str], groups: int, settings: CostSettings, cloud: Cloud, tmp_path: Path
) -> None:
    settings = replace(settings, shared=settings.shared | targets)
    cost = measure_cost(MODES["edge"], settings, cloud, tmp_path / "edge")
    assert cost.parity == {"bitwise_equal": True, "max_abs_diff": 0.0}
    assert len(cost.steps) == len(cost.alone) == len(cost.first_epoch) == EPOCH_STEPS
    signatures = cost.per_step("round_trips") - (
        2 + 2 * groups * (LAYERS - 2)
    )  # of the transcript, one in 32 exchanges
    assert signatures in (0, pytest.approx(1 / EPOCH_STEPS), pytest.approx(2 / EPOCH_STEPS))
    assert cost.ratio > 0
    assert cost.shares == {}


def test_a_ladder_over_the_cache_moves_nothing_from_the_second_epoch_on(
    settings: CostSettings, cloud: Cloud, tmp_path: Path
) -> None:
    cost = measure_cost(MODES["taps"], settings, cloud, tmp_path / "taps")
    assert cost.per_step("bytes_up", first=True) > 2 * 16 * 16 * 4
    assert (cost.per_step("bytes_up"), cost.per_step("bytes_down"), cost.per_step("round_trips")) == (0, 0, 0)
    assert cost.parity["max_abs_diff"] < 1e-5


@pytest.mark.long
def test_a_policy_s_shares_are_those_of_the_steps_made(settings: CostSettings, cloud: Cloud, tmp_path: Path) -> None:
    mode = Mode("random", "kill_revive", {"sites": "all", "site_policy": "random", "site_traffic": 0.5}, chooses=True)
    cost = measure_cost(mode, replace(settings, rounds=1), cloud, tmp_path / "random")
    assert cost.parity == {"bitwise_equal": None, "max_abs_diff": None}
    assert 0 < cost.shares["computation"] <= 0.195
    assert 0 < cost.shares["traffic"] <= 0.5


def test_a_process_that_fails_says_why(settings: CostSettings, tmp_path: Path) -> None:
    nobody = Cloud("isthmus://127.0.0.1:9#SHA256:" + "A" * 43, tmp_path / "no-key")
    with pytest.raises(IsthmusError, match=r"process of edge, split failed.*no-key"):
        measure_cost(MODES["edge"], settings, nobody, tmp_path / "edge")


def regime_of(folder: Path, **values: Any) -> Regime:
    settings = Regime(
        task="e2e",
        data_folder=task_folder(folder),
        sizes=Sizes(test=3, validation=2, max_length=32),
        steps=4,
        batch=2,
        rates=(3e-2,),
        seeds=1,
        precision="fp32",
        cloud_dtype="fp32",
        threads=1,
        shared={"rank": 2},
    )
    return replace(settings, **values)


def test_gradients_over_a_codec_are_compared_with_those_over_fp32(runs: Runs, cloud: Cloud, tmp_path: Path) -> None:
    regime = regime_of(tmp_path / "data", batch=1)
    task = load_task("e2e", regime.data_folder, load_tokenizer(runs.model), regime.sizes)
    parsed = {text: WireCodecs.parse(text) for text in ("fp32", "bf16", "int4")}
    found = measure_cosines(cloud, task, regime, 3, parsed)
    assert found["fp32"] == pytest.approx([1.0] * 3, abs=1e-12)
    assert all(0.99 < value < 1 for value in found["bf16"])
    assert all(int4 < bf16 for int4, bf16 in zip(found["int4"], found["bf16"], strict=True))


def test_a_run_is_scored_on_held_out_data_and_not_made_again(
    runs: Runs, cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regime = regime_of(tmp_path / "data", rates=(1e-12, 3e-2))

    def scorer() -> Scorer:
        cells = Cells(tmp_path / "cells.jsonl", Console(file=io.StringIO()))
        return Scorer(resolve(str(runs.model)), "1:1", regime, cells, tmp_path, lambda _plan: cloud)

    first = scorer()
    rate = first.best_rate(MODES["edge"])
    result = first.run(MODES["edge"], rate, 0)
    assert rate == 3e-2
    assert result["scores"]["completion_loss"] != first.zero_shot()["completion_loss"]
    assert result["report"]["steps"] == 4

    def refuse(*_: Any) -> Any:
        raise AssertionError("a finished run was made again")

    assert first.run(MODES["edge_summed"], rate, 0)["report"]["steps"] == 4  # an option that takes no value
    monkeypatch.setattr(placement_scores, "run_isthmus", refuse)
    assert scorer().run(MODES["edge"], rate, 0) == result
