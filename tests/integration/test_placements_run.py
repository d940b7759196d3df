"""`edge train` with low-rank and leased sites and with a ladder, against a real cloud in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.train_runs import Runs, cloud_for_runs
from support.run_folders import adapter, assert_same_run, losses
from transformers import AutoModelForCausalLM

from isthmus.backbone.adapters.adapter_files import load_adapter
from isthmus.backbone.checkpoints.sources import load_tokenizer
from isthmus.common.errors import ConfigError
from isthmus.edge.data.batches import Batches, load_data
from isthmus.edge.training.evaluation import evaluate


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with cloud_for_runs(tmp_path_factory.mktemp("placed"), layers=5) as started:
        yield started


WAYS: dict[str, dict[str, Any]] = {
    "low_rank": {"method": "low_rank", "sites": "all", "rank": 4},
    "svd": {"method": "low_rank", "sites": "1,3", "rank": 4, "basis": "svd"},
    "ladder": {"method": "ladder", "taps": 2, "reduction": 2},
    "narrow taps": {"method": "ladder", "taps": 3, "reduction": 2, "tap_width": 8},
    "leased": {"sites": "all", "leased": "all"},
    "some leased": {"sites": "all", "leased": "2"},
    "summed": {"sites": "all", "summed": True},
    "bottleneck": {"sites": "1,3", "method": "bottleneck"},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_learns_and_its_adapter_gives_the_whole_model_the_same_loss(runs: Runs, tmp_path: Path, way: str) -> None:
    config = runs.config(tmp_path / "run", **WAYS[way], steps=6)
    report = runs.train(tmp_path / "run", **WAYS[way], steps=6)
    assert report.loss_after is not None
    assert report.loss_before is not None
    assert report.loss_after < report.loss_before
    model: Any = AutoModelForCausalLM.from_pretrained(runs.model, dtype=torch.float32)
    tuned = load_adapter(model, tmp_path / "run" / "adapter")
    data = load_data(config, load_tokenizer(runs.model))
    alone = evaluate(tuned, Batches(data.validation, config.batch, data.pad_id))
    assert report.loss_after == pytest.approx(alone, rel=1e-5)


def test_leased_sites_end_in_the_adapter_of_sites_on_the_edge(runs: Runs, tmp_path: Path) -> None:
    leased = runs.train(tmp_path / "leased", sites="all", leased="all")
    own = runs.train(tmp_path / "edge", sites="all")
    assert_same_run(tmp_path / "leased", tmp_path / "edge")
    assert leased.loss_after == own.loss_after
    assert leased.bytes_up + leased.bytes_down < own.bytes_up + own.bytes_down


def test_some_leased_sites_move_less_than_none_and_more_than_all(runs: Runs, tmp_path: Path) -> None:
    ways = {"none": "none", "some": "1-2", "all": "all"}
    moved = {}
    for name, leased in ways.items():
        report = runs.train(tmp_path / name, sites="all", leased=leased)
        moved[name] = report.bytes_up + report.bytes_down
        assert_same_run(tmp_path / name, tmp_path / "none")
    assert moved["all"] < moved["some"] < moved["none"]


def test_summed_gradients_are_those_of_one_each_but_for_rounding(runs: Runs, tmp_path: Path) -> None:
    apart = runs.train(tmp_path / "apart", sites="all", dropout=0.1)
    summed = runs.train(tmp_path / "summed", sites="all", dropout=0.1, summed=True)
    assert summed.bytes_up < apart.bytes_up
    assert summed.bytes_down == apart.bytes_down
    for one, other in zip(losses(tmp_path / "apart"), losses(tmp_path / "summed"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_bottlenecks_behind_cloud_layers_learn_and_load_back_into_a_split_model(runs: Runs, tmp_path: Path) -> None:
    way: dict[str, Any] = {"sites": "all", "method": "bottleneck"}
    first = runs.train(tmp_path / "first", **way)
    names = adapter(tmp_path / "first")
    assert {name.split(".")[2] for name in names} == {"0", "1", "2", "3", "4"}
    assert all(bool(value.any()) for name, value in names.items() if name.endswith("weight"))
    again = runs.train(tmp_path / "again", **way, start_from=tmp_path / "first" / "adapter")
    assert first.loss_after is not None
    assert again.loss_before == pytest.approx(first.loss_after, rel=1e-6)


@pytest.mark.parametrize("method", ["low_rank", "bottleneck"])
def test_a_policy_chooses_among_sites_of_our_own_adapters(runs: Runs, tmp_path: Path, method: str) -> None:
    every = runs.train(tmp_path / "every", sites="all", method=method)
    chosen = runs.train(
        tmp_path / "chosen", sites="all", method=method, site_policy="even", site_traffic=0.5, site_computation=0.5
    )
    assert chosen.bytes_up + chosen.bytes_down < every.bytes_up + every.bytes_down


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"sites": "all", "leased": "all", "dropout": 0.1}, "dropout 0.1"),
        ({"sites": "all", "leased": "all", "method": "vera"}, "method vera"),
        ({"sites": "all", "leased": "all", "site_policy": "even"}, "site_policy = 'even'.*leased ones have none"),
        ({"leased": "all"}, "give --sites all"),
        ({"sites": "all", "lend_dead": True}, "site_policy is 'always'"),
        ({"sites": "all", "lend_dead": True, "site_policy": "kill-revive", "dropout": 0.1}, "dropout 0.1"),
        ({"sites": "1,2", "leased": "2-3"}, "leased has layer 3"),
        ({"method": "ladder", "sites": "all"}, "method ladder"),
    ],
)
def test_what_does_not_go_together_is_refused(runs: Runs, tmp_path: Path, values: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        runs.config(tmp_path, **values)


def test_leased_layers_of_the_edge_are_refused(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"leased has layer 4.*layers 1 to 3"):
        runs.train(tmp_path, sites="all", leased="3-4")


def test_more_taps_than_layers_are_refused(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="taps = 9: the cloud holds 3 layers"):
        runs.train(tmp_path, method="ladder", taps=9)
