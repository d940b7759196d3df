"""The table's engine on a tiny model: what must be equal is equal, what is done is not done again."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.models.small_tasks import table_settings, task_folder
from support.models.tiny import tiny_checkpoint

from isthmus.common.errors import ConfigError, PlanError
from isthmus.experiments.offsite import table_lab
from isthmus.experiments.offsite.table import run_table
from isthmus.experiments.offsite.table_rows import FIELDS, show


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return task_folder(tmp_path_factory.mktemp("data"))


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_a_whole_emulator_gives_plug_in_tuned_and_reference_exactly(model: Path, data: Path, tmp_path: Path) -> None:
    result = run_table(table_settings(model, data, tmp_path, keep="1.0", whole_runs=False), console=quiet())
    (row,) = result["runs"]
    assert row["plug_in"] == row["emulator_tuned"] == row["edge_layers_full_middle"]
    assert row["full_zero_shot"] == row["emulator_zero_shot"]
    assert row["plug_in"] != row["full_zero_shot"]
    assert row["share_given_away"] == 1


def test_the_rows_have_every_column_and_a_given_emulator_is_scored_as_it_is(
    model: Path, data: Path, tmp_path: Path
) -> None:
    settings = table_settings(model, data, tmp_path, tasks="openbookqa,e2e", seeds=1)
    result = run_table(settings, console=quiet())
    assert [(row["task"], row["metric"]) for row in result["runs"]] == [
        ("openbookqa", "accuracy"),
        ("openbookqa", "completion_loss"),
        ("e2e", "completion_loss"),
    ]
    for row in result["runs"]:
        assert all(isinstance(row[name], float) for name in FIELDS)
        assert row["higher_is_better"] == (row["metric"] == "accuracy")
        assert row["share_given_away"] == 0.5
    shown = io.StringIO()
    show(result, Console(file=shown, width=300))
    assert "openbookqa" in shown.getvalue()

    (folder,) = (path for path in (tmp_path / "emulators").iterdir() if path.is_dir())
    given = run_table(table_settings(model, data, tmp_path, methods=str(folder), seeds=1), console=quiet())
    again = next(row for row in result["runs"] if row["task"] == "e2e")
    assert given["runs"][0] == again | {"method": folder.name}


def test_finished_cells_are_not_made_again(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = table_settings(model, data, tmp_path, methods="uniform,importance", whole_runs=False)
    train = table_lab.Lab._train
    calls: list[int] = []

    def stop_at_the_fourth(self: table_lab.Lab, task: Any, seed: int, *rest: Any) -> Any:
        calls.append(seed)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(self, task, seed, *rest)

    monkeypatch.setattr(table_lab.Lab, "_train", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt, match="repeat the command to go on"):
        run_table(settings, console=quiet())
    assert calls == [0, 0, 1, 0]  # two rates and the second seed of the reference, then the first of the tuning

    result = run_table(settings, console=quiet())
    n_reference, n_of_a_method = 3, 6
    assert len(calls) - 4 == 2 * n_of_a_method
    assert len(calls) - 4 + 3 == n_reference + 2 * n_of_a_method
    calls.clear()
    assert run_table(settings, console=quiet()) == result
    assert calls == []


def test_adapters_are_trained_at_their_own_rates_and_a_distilled_emulator_differs(
    model: Path, data: Path, tmp_path: Path
) -> None:
    settings = table_settings(
        model,
        data,
        tmp_path,
        methods="importance,importance+distilled",
        distill_steps=2,
        distill_batch=2,
        seeds=1,
        trainables="lora",
        whole_rates="1e-3",
    )
    plain, distilled = run_table(settings, console=quiet())["runs"]
    assert plain["learning_rate"] == 1e-2
    assert plain["learning_rate_thief"] == 1e-3
    assert plain["emulator"] != distilled["emulator"]
    assert plain["full_zero_shot"] == distilled["full_zero_shot"]
    assert plain["emulator_zero_shot"] != distilled["emulator_zero_shot"]
    assert not list((tmp_path / "emulators").glob("*.distill"))


def test_training_that_runs_away_is_no_candidate(model: Path, data: Path, tmp_path: Path) -> None:
    rates = {"learning_rates": "1e-3,1e30", "whole_rates": "1e-3"}
    result = run_table(table_settings(model, data, tmp_path, **rates, seeds=1, whole_runs=False), console=quiet())
    assert result["runs"][0]["learning_rate"] == 1e-3


def test_what_cannot_be_done_is_said_before_the_work(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="leaves none"):
        run_table(table_settings(model, data, tmp_path, keep="0.01"), console=quiet())
    with pytest.raises(ConfigError, match="not a task"):
        run_table(table_settings(model, data, tmp_path, tasks="glue"), console=quiet())
    with pytest.raises(ConfigError, match="no emulator's or package's folder"):
        run_table(table_settings(model, data, tmp_path, methods="./nowhere"), console=quiet())
    assert not (tmp_path / "cells.jsonl").exists()
