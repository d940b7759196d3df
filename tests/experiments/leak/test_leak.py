"""The ledger on a tiny model: real runs over a cloud that records, and nothing that is finished is made again."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from support.commands import in_process, refused
from support.emulator.packages import tiny_package
from support.privacy.small_leak import all_here, grid_file, small_settings

from isthmus.common.errors import AttackLimitedError, CheckpointError, DataError, UnknownModelError
from isthmus.edge import bridge_fit
from isthmus.emulator.package.manifest import Tuning
from isthmus.experiments.harness.processes import CommandFailedError
from isthmus.experiments.leak import leak
from isthmus.experiments.leak.leak import quick_settings, run_leak
from isthmus.experiments.leak.leak_settings import LeakSettings
from isthmus.experiments.leak.leak_table import table
from isthmus.experiments.leak.rows import attacked_row, recorded_run, row_run
from isthmus.privacy.recording.traffic import Traffic

UNDEFENDED = {
    "name": "undefended",
    "edge_layers": "1:1",
    "steps": 8,
    "also_codecs": ["int8"],
    "views": ["known", "tuned"],
}
PLAIN = {"edge_layers": "1:1", "steps": 4}
NOISE = {"edge_layers": "1:1", "steps": 8, "defence": ["gaussian:clip=1000,sigma=0.0015", "decoys:count=1"]}


NAMES = (
    "token_accuracy", "rare_accuracy", "secret_recall", "rouge_l", "label_accuracy", "prior_accuracy", "coarse_recall",
    "task_loss", "task_accuracy", "task_loss_ratio", "step_ratio", "bytes_per_token",
)  # fmt: skip
KEYS = {"attack", "cut", "mode", "codec", "defence", "front", *NAMES, *(f"{name}_interval" for name in NAMES)}


def interrupted(settings: LeakSettings, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, call: int = 1) -> None:
    """Make the ledger, with Ctrl-C at the end of a call of `where.name`: the first one, or another."""
    whole, calls = getattr(where, name), itertools.count(1)

    def stop(*values: Any, **named: Any) -> Any:
        result = whole(*values, **named)
        if next(calls) == call:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(where, name, stop)
        with pytest.raises(KeyboardInterrupt):
            run_leak(settings)


def calls_of(monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> list[Any]:
    """The first arguments of the calls of `where.name`, filled as they are made."""
    whole, first = getattr(where, name), []

    def noted(*values: Any, **named: Any) -> Any:
        first.append(values[0])
        return whole(*values, **named)

    monkeypatch.setattr(where, name, noted)
    return first


def left_in(out: Path) -> list[str]:
    """The endings of the rows' files and folders."""
    return sorted(path.suffix for path in out.iterdir() if path.name[0] != "." and path.name != "base-model.jsonl")


def of(result: dict[str, Any], row: str, attack: str) -> dict[str, Any]:
    (found,) = [run for run in result["runs"] if (run["row"], run["attack"]) == (row, attack)]
    return found


def test_rows_are_trained_attacked_scored_and_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands, priors = all_here(monkeypatch), calls_of(monkeypatch, row_run, "priors_of")
    averaged, mean_of = list[int](), attacked_row.mean_of

    def noted(passes: Iterator[Traffic]) -> tuple[Traffic, int]:
        sent = list(passes)
        averaged.append(len(sent))
        return mean_of(iter(sent))

    monkeypatch.setattr(attacked_row, "mean_of", noted)
    settings = small_settings(
        tmp_path, grid=[grid_file(tmp_path / "grid.toml", UNDEFENDED, {"name": "noise", **NOISE})]
    )
    result = run_leak(settings)
    shown = capsys.readouterr().err  # each part of an attack that takes long says that it begins
    for part in ("training an inverter: steps", "matching tokens", "learning from public gradients", "reading labels"):
        assert f"\n{part}" in shown
    assert [words[1] for words in commands] == ["train", "eval", "train"]
    assert ["--defence-key" in words for words in commands] == [False, False, True]  # noise follows from --seed

    exact = of(result, "undefended", "vocabulary_matching")
    assert exact["token_accuracy"] == exact["secret_recall"] == 1
    assert exact["token_accuracy_interval"][0] < 1
    assert exact["task_loss_ratio"] == exact["step_ratio"] == 1
    assert of(result, "undefended, int8", "vocabulary_matching")["token_accuracy"] > 0.9
    assert of(result, "undefended", "labels-exact")["label_accuracy"] > 0.9
    private, known = (of(result, f"undefended{side}", "labels-exact") for side in (", private front", ""))
    assert 0.9 < private["label_accuracy"] <= known["label_accuracy"]  # the tuned last layers are known there too
    assert exact["prior_accuracy"] < 0.5
    assert known["prior_unigram_accuracy"] != exact["prior_unigram_accuracy"]  # that of labels
    assert exact["coarse_recall_interval"][1] == 1
    assert KEYS <= set(exact) == set(known)

    noisy = of(result, "noise", "vocabulary_matching")
    assert noisy["token_accuracy"] < 0.5
    assert noisy["epsilon"] is None
    assert noisy["defence_claim"].startswith("(epsilon, delta)")
    assert noisy["task_loss_ratio"] != noisy["loss_ratio_without_defence"]  # the noise is in one of them
    assert exact["loss_ratio_without_defence"] is None
    assert noisy["real_row_found"] is not None
    assert of(result, "noise", "averaged_matching")["front"] == "known"
    assert averaged == [2]  # both passes that the run makes
    assert "averaged_matching" not in {run["attack"] for run in result["runs"] if run["row"] == "undefended"}
    assert exact["real_row_found"] is None
    assert max(map(len, table(result))) <= 80

    assert len(priors) == 2  # of tokens and of labels, for both rows
    assert run_leak(settings) == result
    assert len(commands) == 3
    (path,) = settings.out.glob("noise*.json")
    path.unlink()
    path.write_text("{")
    with pytest.raises(CheckpointError, match="no finished row"):
        run_leak(settings)
    (path,) = settings.out.glob("undefended*.json")
    made = json.loads(path.read_text())
    made["settings"]["public"] = 33
    path.write_text(json.dumps(made))
    with pytest.raises(CheckpointError, match="made with another public"):
        run_leak(settings)


@pytest.mark.long
def test_an_interrupted_row_resumes_wherever_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands, attacks = all_here(monkeypatch), calls_of(monkeypatch, attacked_row, "guess_of")
    settings = small_settings(tmp_path, grid=[grid_file(tmp_path / "grid.toml", {"name": "row", **PLAIN})])
    expected = finished(settings)
    assert (len(commands), len(attacks)) == (1, 6)

    resumed = replace(settings, out=tmp_path / "resumed")
    for stops, (where, name, call) in enumerate(
        [
            (row_run, "record_run", 1),
            (attacked_row, "guess_of", 2),
            (attacked_row, "guess_of", 3),
            (row_run, "priors_of", 1),
            (leak, "write_atomic", 1),
        ]
    ):
        interrupted(resumed, monkeypatch, where, name, call)
        assert left_in(resumed.out) == ([".json", ".unfinished"] if name == "write_atomic" else [".unfinished"])
        # A run that was interrupted is made again, and so is the attack under way; nothing else is.
        assert len(commands) == 2 + (stops > 0)
    assert len(attacks) == 6 + 6 + 2
    assert finished(resumed) == expected
    assert left_in(resumed.out) == [".json"]
    assert len(commands) == 3


def finished(settings: LeakSettings) -> dict[str, Any]:
    """A row's file, without what the clock says."""
    run_leak(settings)
    (path,) = settings.out.glob("*.json")
    made: dict[str, Any] = json.loads(path.read_text())
    assert made.pop("seconds") > 0
    assert len(made.pop("step_seconds")) == PLAIN["steps"]
    return made


def test_other_settings_leave_an_unfinished_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    all_here(monkeypatch)
    settings = small_settings(tmp_path, grid=[grid_file(tmp_path / "grid.toml", {"name": "row", **PLAIN})])
    for public in (32, 33):
        interrupted(replace(settings, public=public), monkeypatch, row_run, "record_run")
    assert left_in(settings.out) == [".unfinished"] * 2


def test_a_run_whose_recording_is_of_no_use_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = all_here(monkeypatch)
    settings = small_settings(tmp_path, grid=[grid_file(tmp_path / "grid.toml", {"name": "row", **PLAIN})])

    def cut_off(*_: Any) -> None:
        raise DataError("raise --record-mib, or repeat the row")

    with monkeypatch.context() as patch:
        patch.setattr(row_run, "read_run", cut_off)
        with pytest.raises(DataError):
            run_leak(settings)
    assert left_in(settings.out) == []
    interrupted(settings, monkeypatch, row_run, "read_run")
    assert len(commands) == 2


def test_a_quick_look_is_smaller_where_nothing_else_is_asked_for(tmp_path: Path) -> None:
    quick = quick_settings(LeakSettings(quick=True, public=77))
    assert (quick.edge_layers, quick.attacked, quick.public, quick.scored) == ("2:2", 4, 77, 8)
    assert quick_settings(LeakSettings(quick=True, grid=[tmp_path])).edge_layers is None
    shown = StringIO()
    with pytest.raises(UnknownModelError, match="did you mean 'smollm2-135m'"):
        run_leak(LeakSettings(model="smollm2-135", quick=True), Console(file=shown))
    assert not shown.getvalue()  # no minutes are named for a model that is none


def test_a_quick_row_that_another_process_has_made_meanwhile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands, shown = all_here(monkeypatch), StringIO()
    grid = [grid_file(tmp_path / "grid.toml", {"name": "row", **PLAIN})]
    settings = small_settings(tmp_path, grid=grid, steps=4, quick=True)
    expected = run_leak(settings, Console(file=shown))
    assert shown.getvalue().startswith("A quick look at 1 row(s), 4 texts and two attacks: about 2 minutes")
    assert [run["attack"] for run in expected["runs"]] == ["vocabulary_matching", "labels-direct"]
    with pytest.raises(CheckpointError, match="made with another quick"):  # the row of all attacks is another one
        run_leak(replace(settings, quick=False))
    (path,) = settings.out.glob("*.json")
    kept = path.rename(tmp_path / "made")

    @contextmanager
    def waited(path: Path) -> Iterator[None]:
        kept.rename(path)
        yield

    monkeypatch.setattr(leak, "locked", waited)
    assert run_leak(settings) == expected
    assert len(commands) == 1


@pytest.mark.long
def test_an_attack_that_its_lists_limit_fails_and_the_other_rows_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_here(monkeypatch)
    rows = [{**PLAIN, "name": "first"}, {**PLAIN, "name": "second", "defence": "smoothing:share=0.5"}]
    settings = small_settings(tmp_path, grid=[grid_file(tmp_path / "grid.toml", *rows)])

    def limited(*_: Any) -> None:
        raise AttackLimitedError("its lists limit it")

    monkeypatch.setattr(attacked_row, "check_unlimited", limited)
    with pytest.raises(AttackLimitedError):
        run_leak(settings)
    assert left_in(settings.out) == [".json"]
    assert list(settings.out.glob("second-*.json"))


def test_top_only_sends_no_gradient_and_an_emulator_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = all_here(monkeypatch)
    shared = {"edge_layers": "1:1", "steps": 3}
    rows = [{**shared, "name": mode, "mode": mode} for mode in ("top-only", "emulator")]
    rows[1]["package"] = str(tmp_path / "package")
    settings = small_settings(tmp_path, grid=[grid_file(tmp_path / "grid.toml", *rows)])
    tiny_package(tmp_path / "package", Path(settings.model), plan="1:1")
    result = run_leak(settings)
    assert [words[:2] for words in commands] == [("edge", "train"), ("emulator", "tune")]
    top = [run for run in result["runs"] if run["mode"] == "top-only"]
    assert of(result, "top-only", "vocabulary_matching")["token_accuracy"] == 1
    assert all(run["label_accuracy"] is None for run in top)
    (nothing,) = [run for run in result["runs"] if run["mode"] == "emulator"]
    assert nothing["attack"] is None
    assert nothing["token_accuracy"] is None
    assert nothing["bytes_per_token"] == 0
    assert nothing["prior_unigram_accuracy"] == top[0]["prior_unigram_accuracy"] > 0
    assert nothing["task_loss"] > 0
    assert nothing["task_loss_ratio"] is None  # no undefended row of this plan


def test_a_row_without_a_package_builds_one_of_the_preset_and_fits_a_bridge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = all_here(monkeypatch)
    here = row_run.run_isthmus
    advice = Tuning(learning_rate=1e-2, steps=2, rank=4)

    def built(*words: str) -> dict[str, Any]:
        """A package of another split than the preset's, which leaves a tiny model one layer in the middle."""
        if words[:2] != ("emulator", "build"):
            return here(*words)
        commands.append(words)
        flags = dict(pairwise(words))
        tiny_package(Path(flags["--out"]), Path(flags["--model"]), plan="1:1", tuning=advice, preset=flags["--preset"])
        return {}

    monkeypatch.setattr(row_run, "run_isthmus", built)
    monkeypatch.setattr(row_run, "top_heavy", lambda _: "1:1")
    (row,) = run_leak(small_settings(tmp_path, steps=3, mode="emulator", edge_layers="1:1"))["runs"]
    assert [words[:2] for words in commands] == [("emulator", each) for each in ("build", "fit", "tune")]
    assert dict(pairwise(commands[0]))["--preset"] == "fidelity"
    assert (row["fit_public_accuracy"] > 0.9, row["fit_private_accuracy"]) == (True, 0)


def test_of_a_fit_the_public_texts_are_read_and_the_private_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = all_here(monkeypatch)
    settings = small_settings(tmp_path, steps=3, mode="emulator", edge_layers="1:1", package=tmp_path / "package")
    model = Path(settings.model)
    advice = Tuning(learning_rate=1e-2, steps=2, rank=4)
    package = tiny_package(tmp_path / "package", model, plan="1:1", tuning=advice, preset="fidelity")
    (row,) = run_leak(settings)["runs"]
    assert [words[:2] for words in commands] == [("emulator", each) for each in ("fit", "tune")]
    assert "--learning-rate" not in commands[-1]
    assert row["attack"] is None
    assert row["bytes_per_token"] == 0
    assert row["fit_public_accuracy"] > 0.9
    assert row["fit_private_accuracy"] == 0
    assert not (tmp_path / "package.bridge").exists()  # the user's package is as it was
    (finished,) = settings.out.glob("*-*.json")
    assert json.loads(finished.read_text())["settings"]["row"]["package"] == package.id  # and no path of it

    # The control: an edge that does not look, and sends a private text among the public ones, is caught.
    whole = row_run.write_jsonl

    def careless(path: Path, rows: Any) -> None:
        private = json.loads((path.parent / "train.jsonl").read_text().splitlines()[0])
        whole(path, [*rows, {"text": private["prompt"] + private["completion"]}] * 2)

    monkeypatch.setattr(row_run, "write_jsonl", careless)
    monkeypatch.setattr(bridge_fit, "_shared", lambda *_: {})
    (caught,) = run_leak(replace(settings, out=tmp_path / "careless"))["runs"]
    assert caught["fit_private_accuracy"] > 0


@pytest.mark.parametrize(("code", "sent", "goes_on"), [(11, 1, True), (11, 0, False), (43, 1, False)])
def test_a_row_goes_on_after_a_fit_that_did_not_help_and_after_no_other(
    code: int, sent: int, goes_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: str) -> None:
        raise CommandFailedError("the fit failed", code)

    cloud = SimpleNamespace(home=tmp_path, connection_file=tmp_path, edge_key=tmp_path, manifest=None)
    for name in ("open_package", "load_worker", "sign", "write_atomic"):
        monkeypatch.setattr(recorded_run, name, lambda *_: cloud)
    monkeypatch.setattr(recorded_run, "LocalCloud", lambda *_: nullcontext(cloud))
    monkeypatch.setattr(recorded_run, "run_isthmus", failing)
    monkeypatch.setattr(recorded_run, "read_traffic", lambda _: SimpleNamespace(forwards=[None] * sent))
    with nullcontext() if goes_on else pytest.raises(CommandFailedError, match="the fit failed"):
        recorded_run.record_fit(LeakSettings(), "2:2", tmp_path)


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--defence", "fog:depth=1"), 10, "'fog' is no defence"),
        (("--defence", "gaussian:clip=1"), 10, "sigma"),
        (("--edge-layers", "9:1"), 22, "9:1"),
        (("--edge-layers", "0:1"), 22, "without layers"),
        (("--codec", "int3"), 10, "'int3'"),
        (("--grid", "nowhere.toml"), 10, "nowhere.toml"),
        (("--row", "cut 99"), 10, "'cut 99'"),
        (("--edge-layers", "1:1", "--row", "cut 2"), 10, "--row"),
    ],
)
def test_what_makes_no_sense_is_refused(
    flags: tuple[str, ...], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: LeakSettings = small_settings(tmp_path)
    own = ("--model", settings.model, "--data-folder", settings.data_folder, "--out", settings.out)
    refused(in_process(capsys, "experiment", "leak", *own, *flags), code, said)
    assert not settings.out.exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = small_settings(tmp_path)
    (tmp_path / "file").write_text("")
    own = ("--model", settings.model, "--edge-layers", "1:1", "--out", tmp_path / "file" / "out")
    refused(in_process(capsys, "experiment", "leak", *own), 51, "file")
