"""`edge train` with a cache of the span's outputs, against a real cloud in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cloud.train_runs import Runs, cloud_for_runs, interrupted
from support.run_folders import assert_same_run, losses

from isthmus.common.errors import ConfigError, UnsupportedCallError
from isthmus.edge.cloud_link import CACHE_FOLDER
from isthmus.edge.run_report import Spent
from isthmus.training.run_checkpoint import load

CACHED: dict[str, Any] = {"span_cache_mib": 8, "steps": None, "epochs": 3, "validation_split": 0.2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with cloud_for_runs(tmp_path_factory.mktemp("middle")) as started:
        yield started


@pytest.fixture(scope="module")
def top_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """A cloud that leaves the edge its last layer only."""
    with cloud_for_runs(tmp_path_factory.mktemp("top"), plan="0:1") as started:
        yield started


def test_from_the_second_epoch_on_nothing_crosses_the_wire(top_runs: Runs, tmp_path: Path) -> None:
    values = {**CACHED, "save_every": 1, "keep_checkpoints": 99}
    cached = top_runs.train(tmp_path / "cached", **values)
    report = json.loads((tmp_path / "cached" / "report.json").read_text())
    micro_batches, per_epoch = 8, 2  # sixteen examples in pairs, four pairs a step
    assert report["calls"] == cached.calls == micro_batches
    spent = {
        step: Spent.from_json(load(tmp_path / "cached" / f"checkpoint-{step}").entries["spent"]).wire
        for step in range(1, 3 * per_epoch + 1)
    }
    first = spent[per_epoch]
    assert first.bytes_up > 0
    assert all(spent[step] == first for step in range(per_epoch, 3 * per_epoch + 1))
    assert (report["bytes_up"], report["bytes_down"]) == (first.bytes_up, first.bytes_down)

    plain = top_runs.train(tmp_path / "plain", **{**values, "span_cache_mib": None})
    assert plain.calls == 3 * micro_batches
    ours, theirs = losses(tmp_path / "cached"), losses(tmp_path / "plain")
    assert ours[:per_epoch] == theirs[:per_epoch]  # the first epoch has the same bits
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-4)


def test_micro_batches_in_flight_share_the_cache(top_runs: Runs, tmp_path: Path) -> None:
    values = {**CACHED, "epochs": 2}
    alone = top_runs.train(tmp_path / "alone", **values)
    overlapped = top_runs.train(tmp_path / "overlapped", overlap=2, **values)
    assert overlapped.calls == alone.calls == 8
    assert_same_run(tmp_path / "overlapped", tmp_path / "alone")


def test_a_resumed_run_finds_what_is_there(top_runs: Runs, tmp_path: Path) -> None:
    top_runs.train(tmp_path / "straight", **CACHED)
    interrupted(top_runs, tmp_path / "broken", 2, "forward", "receiving", **CACHED)
    report = top_runs.train(tmp_path / "broken", resume=True, **CACHED)
    assert_same_run(tmp_path / "broken", tmp_path / "straight")
    assert report.calls <= 8
    assert (tmp_path / "broken" / CACHE_FOLDER).is_dir()
    assert (tmp_path / "broken").stat().st_mode & 0o777 == 0o700


def test_a_cache_under_trained_layers_is_refused(runs: Runs, top_runs: Runs, tmp_path: Path) -> None:
    message = r"span_cache_mib = 8 does not fit this run: .*layers\.0\..*is trainable.*the split, here 1:1, must leave"
    with pytest.raises(UnsupportedCallError, match=message):
        runs.train(tmp_path, **CACHED)
    with pytest.raises(UnsupportedCallError, match="method prompt does not work"):
        top_runs.train(tmp_path, method="prompt", **CACHED)
    assert not (tmp_path / CACHE_FOLDER).exists()
    with pytest.raises(ConfigError, match="adapters inside them change it"):
        top_runs.train(tmp_path, sites="all", **CACHED)
    with pytest.raises(ConfigError, match="tries several: name a codec"):
        top_runs.train(tmp_path, codec="auto", **CACHED)


def test_dropout_of_the_adapters_above_is_no_hindrance(top_runs: Runs, tmp_path: Path) -> None:
    assert top_runs.train(tmp_path, dropout=0.1, **CACHED).calls == 8
