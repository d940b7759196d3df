"""`edge train` with low-rank and leased sites and with a ladder, against a real cloud in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import Runs, assert_same_run, cloud_for_runs
from transformers import AutoModelForCausalLM

from isthmus.backbone.adapters import load_adapter
from isthmus.backbone.errors import ConfigError
from isthmus.backbone.sources import load_tokenizer
from isthmus.edge.data import Batches, load_data
from isthmus.edge.evaluate import evaluate


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with cloud_for_runs(tmp_path_factory.mktemp("placed"), layers=5) as started:
        yield started


WAYS: dict[str, dict[str, Any]] = {
    "low_rank": {"method": "low_rank", "sites": "all", "rank": 4},
    "svd": {"method": "low_rank", "sites": "1,3", "rank": 4, "basis": "svd"},
    "ladder": {"method": "ladder", "taps": 2, "reduction": 2},
    "narrow taps": {"method": "ladder", "taps": 3, "reduction": 2, "tap_width": 8},
    "leased": {"sites": "all", "site_placement": "leased"},
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
    lent = runs.train(tmp_path / "leased", sites="all", site_placement="leased")
    own = runs.train(tmp_path / "edge", sites="all")
    assert_same_run(tmp_path / "leased", tmp_path / "edge")
    assert lent.loss_after == own.loss_after
    assert lent.bytes_up + lent.bytes_down < own.bytes_up + own.bytes_down


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"sites": "all", "site_placement": "leased", "dropout": 0.1}, "dropout 0.1"),
        ({"sites": "all", "site_placement": "leased", "method": "vera"}, "method vera"),
        ({"method": "ladder", "sites": "all"}, "method ladder"),
    ],
)
def test_what_does_not_go_together_is_refused(runs: Runs, tmp_path: Path, values: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        runs.config(tmp_path, **values)


def test_more_taps_than_layers_are_refused(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="taps = 9: the cloud holds 3 layers"):
        runs.train(tmp_path, method="ladder", taps=9)
