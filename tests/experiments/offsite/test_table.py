"""The table of emulators on a tiny model: what must be equal is equal, and nothing is chosen on scored texts."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.models.small_tasks import ADVICE, table_settings, task_folder, task_package
from support.models.tiny import tiny_checkpoint

from isthmus.common.errors import ConfigError
from isthmus.emulator.package.build_presets import PRESETS
from isthmus.emulator.package.manifest import Tuning, protection_rows
from isthmus.emulator.package.package import Package, open_package
from isthmus.experiments.offsite import table_lab
from isthmus.experiments.offsite.table import run_table
from isthmus.experiments.offsite.table_rows import draw_table, row_of, show, table_lines
from isthmus.experiments.scoring.scores import Score
from isthmus.experiments.scoring.tasks import Task

ROWS = {
    *("zero-shot", "reference", "split q and v", "split all", "public alone", "floor", "plug-in", "edge bridge"),
    *("emulator tuned", "other bridge", "owner bridge", "thief", "distilled thief"),
}
PLAIN = ",".join(ROWS - {"distilled thief"})
FEW = ",".join(ROWS - {"other bridge", "owner bridge", "distilled thief"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return task_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def package(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Package]:
    def make(recipe: str, keep: float, tuning: Tuning | None = ADVICE) -> Package:
        return task_package(tmp_path_factory.mktemp("packages") / "package", model, data, recipe, keep, tuning)

    return make


def table(model: Path, data: Path, out: Path, package: Package, **values: Any) -> dict[str, Any]:
    wanted = {
        "preset": [str(package.folder)],
        "adapter_layers": "1:3",
        "split_layers": "1:1",
        "public": 200,
        "private": 20,
        "text": data / "shakespeare" / "input.txt",
        **values,
    }
    return run_table(table_settings(model, data, out, **wanted), console=Console(file=io.StringIO()))


def test_a_whole_emulator_gives_plug_in_tuned_and_reference_exactly(
    model: Path, data: Path, package: Callable[..., Package], tmp_path: Path
) -> None:
    result = table(model, data, tmp_path, package("uniform", 1.0), rows=FEW)
    (run,) = result["runs"]
    values = {name: row["value"] for name, row in run["rows"].items()}
    assert set(values) == set(FEW.split(","))
    assert values["plug-in"] == values["reference"] != values["zero-shot"]
    assert values["edge bridge"] == pytest.approx(values["plug-in"], rel=1e-2)
    assert run["rates"]["plug-in"] == ADVICE.learning_rate
    assert result["settings"]["seeds"] == 1
    assert result["settings"]["preset"] == ["package"]
    (other,) = table(model, data, tmp_path, package("uniform", 1.0), rows=FEW, rate=1e-3)["runs"]
    over = ("floor", "plug-in", "edge bridge", "emulator tuned")
    assert other["rates"] == run["rates"] | dict.fromkeys(over, 1e-3)


def test_adapters_below_are_tuned_in_each_row_where_the_package_advises_them(
    model: Path, data: Path, package: Callable[..., Package], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []

    def untrained(self: table_lab.Lab, task: Task, seed: int, rate: float, build: Any) -> Any:
        tuned = build(self.config(seed, rate, tmp_path))
        names = [name for name, weight in tuned.named_parameters() if weight.requires_grad and ".lora_" in name]
        trained.append("".join(sorted({name.split("layers.")[1][0] for name in names})))
        return tuned

    monkeypatch.setattr(table_lab.Lab, "_train", untrained)
    made = package("uniform", 0.5)
    table(model, data, tmp_path, made, rows=FEW)
    assert sorted(trained) == ["", "", *["05"] * 2, *["345"] * 5]  # a thief trains all weights, without adapters
    trained.clear()
    table(model, data, tmp_path, package("uniform", 0.5, ADVICE.model_copy(update={"layers": "all"})), rows=FEW)
    assert trained == ["0345"] * 5
    # A trial of the owner's, over the other package.
    (run,) = table(model, data, tmp_path, made, rows="plug-in", layers="all")["runs"]
    assert trained == ["0345"] * 5  # its emulator is the same, and so are the cells
    assert list(run["rows"]) == ["zero-shot", "reference", "floor", "plug-in"]
    assert run["tuning"]["layers"] == "all"
    with pytest.raises(ConfigError, match="row 1 of the figures has no thief: make the table with that row"):
        protection_rows([run], run["emulator"], ADVICE)
    (run,) = table(model, data, tmp_path, made, rows="thief", layers="all")["runs"]
    assert list(run["rows"]) == ["zero-shot", "reference", "floor", "edge bridge", "thief"]
    with pytest.raises(ConfigError, match="was not tuned as this package advises"):
        protection_rows([run], run["emulator"], ADVICE)


def test_a_package_is_measured_signed_for_and_shown_and_nothing_is_made_twice(
    model: Path,
    data: Path,
    package: Callable[..., Package],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = package("uniform+bridged", 0.5)
    train = table_lab.Lab._train
    trained: list[tuple[int, int]] = []

    def stop_at_the_fifth(self: table_lab.Lab, task: Task, *rest: Any) -> Any:
        trained.append((self.regime.steps, len(task.train)))
        if len(trained) == 5:
            raise KeyboardInterrupt
        return train(self, task, *rest)

    monkeypatch.setattr(table_lab.Lab, "_train", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt, match="repeat the command to go on"):
        table(model, data, tmp_path, made)
    before = len(trained) - 1
    result = table(model, data, tmp_path, made)
    (run,) = result["runs"]
    assert len(trained) - 1 == 9 + 2 * 2  # one for each row that is trained, and two lengths of each thief
    assert set(run["rows"]) == ROWS
    n_private, n_public = (run["texts"][name] for name in ("train", "public"))
    assert {count for steps, count in trained if steps == 6} == {n_private + n_public}
    assert (3, n_public) in trained
    assert before == 4

    trained.clear()
    assert table(model, data, tmp_path, made) == result
    assert trained == []
    (protection,) = protection_rows(result["runs"], run["emulator"], ADVICE)
    assert protection.thief == min(run["rows"][name]["value"] for name in ("thief", "distilled thief"))
    assert protection.plug_in == run["rows"]["edge bridge"]["value"]
    capsys.readouterr()
    show(result)
    shown = capsys.readouterr().out
    assert "public alone" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_what_is_better_on_the_validation_slice_is_taken_whatever_it_scores(
    model: Path, data: Path, package: Callable[..., Package], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(
        self: table_lab.Lab, task: Task, seed: int, rates: Sequence[float], _build: Any, views: Any, **_: Any
    ) -> dict[str, Any]:
        name, n = next(iter(views)), len(task.held_out)
        losses = {"split 1:1 all": 0.1, "tuned": 0.3, "plug-in": 0.3}
        if "thief" in name:  # the longer run is the better one by validation, and the worse one by its score
            loss, score = (0.2, 9.0) if self.regime.steps == 6 else (0.4, 1.0)
        else:
            loss, score = losses.get(name, 0.5), 2.0
        scores = {
            view: {"completion_loss": Score("completion_loss", (score,) * n, (1.0,) * n).to_json()} for view in views
        }
        return {"rate": rates[0], "validation_loss": loss, "tried": {}, "scores": scores}

    monkeypatch.setattr(table_lab.Lab, "run", run)
    made = package("uniform", 0.5)
    (result,) = table(model, data, tmp_path / "longer", made, rows=FEW, seeds=3, few_seeds=2)["runs"]
    assert result["thief"] == 9.0
    seeds = {name: row["seeds"] for name, row in result["rows"].items()}
    assert [seeds[name] for name in ("zero-shot", "reference", "edge bridge", "thief")] == [1, 3, 3, 2]
    assert result["best_split"] == "split all"
    monkeypatch.setattr(table_lab.Lab, "run", lambda self, *a, **k: {**run(self, *a, **k), "validation_loss": 0.1})
    wanted = {"preset": ["fidelity"], "adapter_layers": "1:2", "rows": PLAIN}
    (result,) = table(model, data, tmp_path / "tuned", made, **wanted)["runs"]
    assert result["thief"] == 2.0  # the tuned emulator is no worse
    (folder,) = (tmp_path / "tuned" / "packages").glob("fidelity-*")
    built = open_package(folder).manifest
    assert (built.preset, built.recipe) == (result["preset"], result["method"]) == ("fidelity", "kl+bridged+closed")
    assert "owner bridge" in result["rows"]


def test_a_preset_that_has_changed_is_built_anew(
    model: Path, data: Path, package: Callable[..., Package], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untrained(self: table_lab.Lab, task: Task, seed: int, rate: float, build: Any) -> Any:
        return build(self.config(seed, rate, tmp_path))

    monkeypatch.setattr(table_lab.Lab, "_train", untrained)
    wanted = {"adapter_layers": "1:2", "preset": ["whole"], "rows": "plug-in"}
    (first,) = table(model, data, tmp_path, package("uniform", 0.5), **wanted)["runs"]
    assert (first["method"], first["keep"], first["tuning"]["layers"]) == ("uniform+int4", 1.0, "all")
    monkeypatch.setitem(PRESETS, "whole", replace(PRESETS["whole"], gives_not="in other words"))
    (again,) = table(model, data, tmp_path, package("uniform", 0.5), **wanted)["runs"]
    assert again["emulator"] == first["emulator"]
    monkeypatch.setitem(PRESETS, "whole", replace(PRESETS["whole"], method="uniform+int8"))
    (other,) = table(model, data, tmp_path, package("uniform", 0.5), **wanted)["runs"]
    assert other["method"] == "uniform+int8"
    assert len(list((tmp_path / "packages").glob("whole-*"))) == 2


def test_a_package_without_advice_is_tuned_as_the_presets_advise(
    model: Path, data: Path, package: Callable[..., Package], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regimes: set[tuple[int, int]] = set()

    def untrained(self: table_lab.Lab, task: Task, seed: int, rate: float, build: Any) -> Any:
        regimes.add((self.regime.steps, self.regime.rank))
        return build(self.config(seed, rate, tmp_path))

    monkeypatch.setattr(table_lab.Lab, "_train", untrained)
    (run,) = table(model, data, tmp_path, package("uniform", 0.5, None), rows=FEW)["runs"]
    assert regimes == {(100, 8), (200, 8)}
    assert (run["rates"]["plug-in"], run["higher_is_better"]) == (3e-3, False)


def test_training_that_runs_away_is_no_candidate(
    model: Path, data: Path, package: Callable[..., Package], tmp_path: Path
) -> None:
    made = package("uniform", 0.5)
    (run,) = table(model, data, tmp_path, made, rows=FEW, adapter_rates="1e-3,1e30")["runs"]
    assert run["rates"]["reference"] == 1e-3


def test_what_is_no_preset_is_said_before_the_work(
    model: Path, data: Path, package: Callable[..., Package], tmp_path: Path
) -> None:
    without = package("uniform", 0.5, None)
    with pytest.raises(ConfigError, match="not a task"):
        table(model, data, tmp_path, without, tasks="glue")
    with pytest.raises(ConfigError, match="give its --model and --adapter-layers"):
        table(model, data, tmp_path, package("uniform", 0.5), adapter_layers="1:2")
    with pytest.raises(ConfigError, match="no preset"):
        table(model, data, tmp_path, without, preset=["nowhere"])
    for rate in (0.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match=f"--rate '{rate:g}' is not"):
            table(model, data, tmp_path, without, rate=rate)
    with pytest.raises(ConfigError, match="--layers 'below' is not understood: give above or all"):
        table(model, data, tmp_path, without, layers="below")
    with pytest.raises(ConfigError, match="--rows 'plugin' is not known: choose of zero-shot, reference"):
        table(model, data, tmp_path, without, rows="plugin")
    assert not (tmp_path / "cells.jsonl").exists()


# Shares ---------------------------------------------------------------------------------------------------------------


def scores(*values: float) -> list[Score]:
    """One for each seed, of four texts that are about as hard in each."""
    hard = (-0.01, 0.0, 0.02, -0.01)
    return [Score("completion_loss", tuple(value + each for each in hard), (1.0,) * 4) for value in values]


def row(preset: str = "guarded", **changed: Sequence[Score]) -> dict[str, Any]:
    given = {
        "zero-shot": scores(3.0),
        "reference": scores(1.0, 1.1),
        "split q and v": scores(1.4),
        "split all": scores(0.8, 0.8),
        "floor": scores(2.0, 2.2),
        "plug-in": scores(1.2, 1.3),
        "edge bridge": scores(1.0, 1.1),
        "thief": scores(2.4),
        **changed,
    }
    return row_of(given, best_split="split all", task="e2e", metric="completion_loss", preset=preset)


def test_shares_are_of_the_reference_of_split_and_above_the_floor() -> None:
    made = row()
    found = made["rows"]["plug-in"]
    share, floor = found["of_reference"], made["rows"]["floor"]["of_reference"]
    assert share == pytest.approx(1.75 / 1.95)
    assert found["of_split"] == pytest.approx(1.75 / 2.2)
    assert found["above_floor"] == pytest.approx((share - floor) / (1 - floor))
    assert made["rows"]["floor"]["above_floor"] == 0
    # The seeds are paired: what is as good as the reference in each of them has no interval.
    assert made["rows"]["edge bridge"]["of_reference_interval"] == pytest.approx([1, 1])
    low, high = found["of_reference_interval"]
    assert 0 < high - low < 0.1
    assert list(made["targets"].values()) == [True, True]
    assert list(row("fidelity")["targets"].values()) == [False, True]
    assert list(row("package")["targets"].values()) == [False, True, True, True]
    assert "yes 40 % above the floor" in table_lines([made])


def test_of_two_thieves_the_better_one_counts() -> None:
    assert row()["thief"] == pytest.approx(2.4)
    stronger = row(**{"distilled thief": scores(1.4)})
    assert stronger["thief"] == pytest.approx(1.4)
    assert stronger["thief_recovery"] == stronger["rows"]["distilled thief"]["of_reference"]
    assert list(stronger["targets"].values()) == [True, False]
    assert row(**{"distilled thief": scores(2.6)})["thief"] == pytest.approx(2.4)


def test_no_share_is_told_of_a_gain_that_is_not_clear() -> None:
    made = row(reference=scores(2.9, 3.1))
    assert "of_reference" not in made["rows"]["plug-in"]
    assert made["plug_in_recovery"] is None
    assert made["targets"] == {}
    assert "-" in table_lines([made])


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_each_emulator_and_task_with_a_clear_gain_is_a_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", lambda _figure: None)
    draw_table([row(), row("fidelity", reference=scores(2.9, 3.1))], tmp_path / "new" / "table.png", "tiny")
    assert (tmp_path / "new" / "table.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    bridged, plain = [line for line in pyplot.gcf().axes[0].lines if line.get_marker() == "o"]
    assert bridged.get_xydata().tolist() == [[pytest.approx(30), pytest.approx(100)]]
    assert plain.get_xydata().tolist() == [[pytest.approx(30), pytest.approx(175 / 1.95)]]
    draw_table([], tmp_path / "empty.png", "nothing")
