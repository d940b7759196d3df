"""`isthmus emulator build`: what a package holds, how it is distilled, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.emulator.emulator_owner import Owner
from typer.testing import CliRunner

from isthmus.backbone.checkpoints import sources
from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.cli.emulator_commands import app
from isthmus.common.errors import (
    ConfigError,
    DataError,
    IsthmusError,
    KeyFileError,
    PlanError,
    UnknownModelError,
)
from isthmus.emulator.compress.bridges import LEAST_TOKENS_PER_INPUT
from isthmus.emulator.compress.emulator_model import build_emulator
from isthmus.emulator.compress.recipe import Recipe
from isthmus.emulator.distill.distillation import DistillConfig
from isthmus.emulator.package.build import measure_quality, own_tokens
from isthmus.emulator.package.build_presets import PRESETS, top_heavy
from isthmus.emulator.package.package import open_package

IDS = torch.tensor([[5, 9, 33, 120, 7, 2]])


def test_a_package_is_built_and_verified(owner: Owner, package: Path) -> None:
    said = json.loads(owner.run("verify", "--package", package, "--signer", owner.pin, "--json"))
    assert (said["model"], said["plan"], said["recipe"], said["licence"]) == ("model", "1:1", "uniform", "tuning only")
    assert said["layers"] == [1, 4]
    assert said["share_of_parameters"] == 0.5
    assert (said["signer"], said["protection"], said["distilled"]) == (owner.pin, [], None)
    assert said["id"] == open_package(package).id


def test_a_connection_string_is_a_signer_too(owner: Owner, package: Path) -> None:
    assert "tuning only" in owner.run("verify", "--package", package, "--signer", f"isthmus://host:7443#{owner.pin}")


@pytest.mark.parametrize("method", ["importance+int8", "crash+lowrank:0.5", "crash-drop+int4"])
def test_layers_are_chosen_by_public_text(owner: Owner, tmp_path: Path, method: str) -> None:
    said = owner.build(tmp_path / "p", "--method", method, "--text", owner.text, "--length", 32)
    assert said["recipe"] == method
    with torch.no_grad():
        assert open_package(tmp_path / "p").load_model()(IDS).logits.isfinite().all()


def test_a_distilled_package_says_so_and_leaves_no_state(owner: Owner, tmp_path: Path) -> None:
    said = owner.build(tmp_path / "p", *owner.distil_arguments(), "--kl-weight", 0)
    assert (said["distilled"]["steps"], said["distilled"]["tokens"]) == (3, 3 * 2 * 32)
    assert said["distilled"]["error_after"] < said["distilled"]["error_before"]
    assert [entry.name for entry in tmp_path.iterdir() if not entry.name.startswith(".")] == ["p"]
    assert "3 steps, 192 tokens" in owner.run("verify", "--package", tmp_path / "p")


def test_a_draft_has_three_layers_and_says_how_near_it_came(owner: Owner, tmp_path: Path) -> None:
    said = owner.build(tmp_path / "p", "--draft", *owner.distil_arguments(steps=8), "--learning-rate", 0.003)
    assert len(said["layers"]) == 3
    done = said["distilled"]
    assert done["kl_after"] < done["kl_before"]
    assert not said["allow_draft_tuning"]
    shown = owner.run("verify", "--package", tmp_path / "p")
    before, after = done["agreement_before"], done["agreement_after"]
    assert f"KL divergence    {done['kl_before']:.4g} -> {done['kl_after']:.4g} nats a token" in shown
    assert f"top-1 agreement  {before:.1%} -> {after:.1%} of the tokens with the whole model" in shown


@pytest.mark.parametrize(
    ("options", "weights", "layers"),
    [
        ([], (30.0, 0.0, 1.0), 2),
        (["--kl-weight", 0.5, "--lm-weight", 1], (30.0, 1.0, 0.5), 2),
        (["--draft"], (0.0, 0.0, 1.0), 3),
        (["--preset", "guarded"], (30.0, 0.0, 1.0), 1),
        (["--preset", "fidelity", "--lm-weight", 2, "--keep", 0.5], (30.0, 2.0, 1.0), 2),
        (["--draft", "--mse-weight", 2, "--kl-weight", 3, "--keep", 0.25], (2.0, 0.0, 3.0), 1),
    ],
)
def test_the_preset_of_a_draft_gives_way_to_what_is_given(
    owner: Owner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[object],
    weights: tuple[float, ...],
    layers: int,
) -> None:
    from isthmus.emulator.package import build

    class Seen(Exception):
        pass

    def seen(_out: Path, _checkpoint: object, plan: SplitPlan, recipe: Recipe, distillation: Any, **_: object) -> None:
        config: DistillConfig = distillation[0]
        assert (config.mse_weight, config.lm_weight, config.kl_weight) == weights
        assert recipe.layers_kept(len(plan.cloud)) == layers
        raise Seen

    monkeypatch.setattr(build, "build_package", seen)
    with pytest.raises(Seen):
        owner.build(tmp_path / "p", *options, *owner.distil_arguments())


@pytest.mark.parametrize(("preset", "layers"), [("fidelity", 2), ("guarded", 1), ("whole", 3)])
def test_a_preset_says_how_good_it_is_and_how_to_tune(
    owner: Owner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, layers: int
) -> None:
    from isthmus.emulator.package import build

    monkeypatch.setattr(build, "OWN_TOKENS", 512)
    out = tmp_path / "p"
    whole = preset == "whole"
    where = ["--home", owner.home, "--device", "cpu", "--length", 16, *([] if whole else ["--distill-steps", 2])]
    said = json.loads(owner.run("build", "--model", owner.model, "--out", out, "--preset", preset, *where, "--json"))
    recipe = "uniform+int4" if whole else "kl+bridged+closed"
    assert (said["preset"], said["plan"], said["recipe"]) == (preset, "1:2", recipe)
    assert (len(said["layers"]), said["distilled"] is None) == (layers, whole)
    quality = said["quality"]
    assert quality["kl"] > 0
    assert -1 <= quality["cosine_below"] <= quality["cosine_above"] <= 1
    assert said["refuses_below"] != whole  # whatever the cosine
    tuning = {"learning_rate": 0.003, "steps": 100, "rank": 8, "warmup_steps": 0}
    assert said["tuning"] == {**tuning, "layers": "all" if whole else "above"}
    assert [entry.name for entry in tmp_path.iterdir() if not entry.name.startswith(".")] == ["p"]
    shown = owner.run("verify", "--package", out)
    assert f"preset           {preset} ({PRESETS[preset].gives_not})" in shown
    layers_said = "all layers" if whole else "layers above"
    assert f"tune with        learning rate 0.003, 100 steps, rank 8, 0 warm-up steps, {layers_said}" in shown
    assert f"KL {quality['kl']:.4g} nats a token" in shown
    below = "allowed" if whole else "not allowed"
    assert f"adapters below   {below}\n" in shown


def test_a_presets_text_is_kept_until_the_package_is_there(
    owner: Owner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isthmus.emulator.package import build

    class Stopped(Exception):
        pass

    def stop(*_: object, **__: object) -> None:
        raise Stopped

    monkeypatch.setattr(build, "OWN_TOKENS", 512)
    arguments = ["build", "--model", owner.model, "--out", tmp_path / "p", "--preset", "fidelity", "--length", 16]
    with monkeypatch.context() as patch:
        patch.setattr(build, "write_sample", lambda path, *_, **__: path.write_text("begun") and stop())
        with pytest.raises(Stopped):
            owner.run(*arguments, "--home", owner.home, "--device", "cpu")
    assert list(tmp_path.glob("p.text-*")) == []  # what is not finished is not kept
    with monkeypatch.context() as patch:
        patch.setattr(build, "build_emulator", stop)
        with pytest.raises(Stopped):
            owner.run(*arguments, "--home", owner.home, "--device", "cpu")
    (text,) = tmp_path.glob("p.text-*.jsonl")
    assert text.read_text().count("\n") >= 32
    monkeypatch.setattr(build, "write_sample", stop)  # it is not written again
    owner.run(*arguments, "--home", owner.home, "--device", "cpu", "--keep", 0.5)
    assert not text.exists()
    manifest = open_package(tmp_path / "p").manifest  # with --keep it is another emulator than the preset's
    assert (manifest.preset, manifest.tuning, manifest.plan) == (None, None, "1:2")
    assert manifest.quality is not None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["guarded"], ""),
        (["guarded", "--distill-steps", 3], ""),
        (["guarded", "--keep", 0.25, "--mse-weight", 30, "--lm-weight", 0], ""),
        (["guarded", "--keep", 1.0], "options change what guarded makes: the package has not its name"),
        (["guarded", "--method", "uniform"], "options change"),
        (["guarded", "--adapter-layers", "1:1"], "options change"),
        (["guarded", "--kl-weight", 2], "options change"),
        (["guarded", "--lm-weight", 2], "--lm-weight 2: on text like the task's it teaches the emulator the task"),
        (["fidelity", "--distill", "public.txt"], ""),
        (["whole"], ""),
        (["whole", "--distill", "public.txt"], "options change what whole makes"),
        (["whole", "--method", "uniform+int8"], "options change what whole makes"),
    ],
)
def test_a_preset_that_is_changed_says_so(
    owner: Owner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[object], said: str
) -> None:
    from isthmus.emulator.package import build

    made: list[bool] = []

    def seen(_out: Path, _checkpoint: object, plan: SplitPlan, recipe: Recipe, distillation: Any, **given: Any) -> None:
        made.append(given["preset"].makes(plan, recipe, distillation and distillation[0]))

    monkeypatch.setattr(build, "build_package", seen)
    arguments = ["build", "--model", owner.model, "--out", tmp_path / "p", "--home", owner.home, "--preset"]
    done = CliRunner().invoke(app, [str(argument) for argument in [*arguments, *options]])
    assert made == [not said]
    assert said in done.stderr
    assert bool(done.stderr) == bool(said)
    assert ("thief" in done.stderr) == (options == ["guarded", "--lm-weight", 2])


@pytest.mark.parametrize(
    ("options", "said"), [(["--preset", "fidelity", "--draft"], "--draft is"), (["--preset", "x"], "'x' is not known")]
)
def test_a_preset_that_is_none_is_refused(owner: Owner, tmp_path: Path, options: list[object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        owner.build(tmp_path / "p", *options, *owner.distil_arguments())


@pytest.mark.parametrize(("n_layers", "plan"), [(30, "2:6"), (4, "1:2"), (12, "1:2"), (16, "2:3"), (80, "2:16")])
def test_a_presets_plan_has_more_layers_above(n_layers: int, plan: str) -> None:
    assert top_heavy(n_layers) == plan


@pytest.mark.parametrize("width", [64, 576, 2048, 4096, 16384])
@pytest.mark.parametrize("length", [16, 256, 4096])
def test_a_model_writes_enough_for_its_own_bridges(width: int, length: int) -> None:
    written = own_tokens(width, length)
    assert written >= 20_000
    lost = written // 4  # special tokens
    n_blocks = (written - lost) // length
    assert (n_blocks - 8) * length >= LEAST_TOKENS_PER_INPUT * width
    assert own_tokens(576, 256) == 20_000


def test_an_emulator_that_is_the_middle_has_no_kl_and_the_same_gradient(owner: Owner) -> None:
    checkpoint = Checkpoint(owner.model, "tiny")
    plan = SplitPlan.parse("1:2", 6)
    ids = torch.randint(3, 250, (4, 16), generator=torch.Generator().manual_seed(0))
    whole = build_emulator(checkpoint, plan, Recipe.parse("uniform", 1.0), None)
    quality = measure_quality(checkpoint, plan, whole, ids, 4)
    assert (quality.kl, quality.tokens) == (pytest.approx(0, abs=1e-6), 64)
    assert (quality.cosine_below, quality.cosine_above) == (pytest.approx(1), pytest.approx(1))
    one = measure_quality(
        checkpoint, plan, build_emulator(checkpoint, plan, Recipe.parse("uniform", 0.3), None), ids, 4
    )
    assert one.kl > 0.01
    assert one.cosine_below < 0.99


def test_consent_to_tuning_a_draft_is_written_and_shown(owner: Owner, package: Path, tmp_path: Path) -> None:
    assert owner.build(tmp_path / "p", "--allow-draft-tuning")["allow_draft_tuning"] is True
    shown = {path: owner.run("verify", "--package", path) for path in (tmp_path / "p", package)}
    assert "draft tuning     allowed\n" in shown[tmp_path / "p"]
    assert "draft tuning     not allowed\n" in shown[package]
    owner.run("sign", "--package", tmp_path / "p", "--home", owner.home)
    assert open_package(tmp_path / "p").manifest.allow_draft_tuning


def test_an_interrupted_distillation_goes_on_when_the_command_is_repeated(
    owner: Owner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isthmus.emulator.distill import distillation

    undisturbed = owner.build(tmp_path / "undisturbed", *owner.distil_arguments())
    measure = distillation._Distillation.measure

    def interrupted(task: Any, step: int) -> Any:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(task, step)

    arguments = owner.build_arguments(tmp_path / "p", *owner.distil_arguments(), "--json")
    monkeypatch.setattr(distillation._Distillation, "measure", interrupted)
    stopped = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert stopped.exit_code == 130
    assert "Stopped after step 1 of 3" in stopped.output
    assert not (tmp_path / "p").exists()
    assert (tmp_path / "p.distill").is_dir()

    monkeypatch.undo()
    said = json.loads(owner.run(*arguments))
    assert said["files"] == undisturbed["files"]
    assert said["distilled"] == undisturbed["distilled"]
    assert not (tmp_path / "p.distill").exists()


def test_an_older_package_is_replaced(owner: Owner, package: Path, tmp_path: Path) -> None:
    shutil.copytree(package, tmp_path / "p")
    assert owner.build(tmp_path / "p", "--keep", 0.25)["layers"] == [2]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--keep", 0.05], PlanError, r"keep 0\.05 of 4 middle layers leaves none; use 0\.126"),
        (["--keep", 7], ConfigError, "keep 7"),
        (["--method", "magic"], ConfigError, "magic"),
        (["--method", "importance"], ConfigError, "--text"),
        (["--method", "crash", "--text", "nowhere.txt"], DataError, "nowhere.txt"),
        (["--adapter-layers", "3:3"], PlanError, "3:3"),
        (["--adapter-layers", "2"], PlanError, "'2'"),
        (["--home", "nowhere"], KeyFileError, "isthmus cloud keygen"),
        (["--licence", "x" * 5000], ConfigError, "--licence has 5000 characters"),
        (["--device", "abacus"], ConfigError, "abacus"),
        (["--distill", "nowhere.txt"], DataError, "nowhere.txt"),
        (["--draft"], ConfigError, "isthmus emulator sample"),
        (["--kl-weight", 2], ConfigError, "--kl-weight 2 is for a distillation"),
        (["--distill-steps", 5], ConfigError, "--distill-steps 5 is for a distillation"),
        (["--preset", "whole", "--lm-weight", 2], ConfigError, "--lm-weight 2 is for a distillation"),
        (["--distill", "nowhere.txt", "--precision", "fp8"], ConfigError, "fp8"),
    ],
    ids=str,
)
def test_a_bad_option_is_named_and_nothing_is_written(
    owner: Owner, tmp_path: Path, arguments: list[object], error: type[IsthmusError], message: str
) -> None:
    with pytest.raises(error, match=message):
        owner.build(tmp_path / "p", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_is_missing_is_told_before_a_model_is_fetched(
    owner: Owner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "resolve", None)
    with pytest.raises(KeyFileError, match="isthmus cloud keygen"):
        owner.build(tmp_path / "p", "--model", "smollm2-135m", "--home", "nowhere")
    with pytest.raises(UnknownModelError, match="did you mean 'smollm2-135m'"):  # and a wrong name before the key
        owner.build(tmp_path / "p", "--model", "smollm2-135", "--home", "nowhere")


@pytest.mark.parametrize("kind", ["file", "folder", "model", "link"])
def test_what_is_no_package_is_not_overwritten(owner: Owner, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    make: dict[str, Callable[[], Any]] = {
        "file": out.touch,
        "folder": out.mkdir,
        "model": lambda: shutil.copytree(owner.model, out),
        "link": lambda: out.symlink_to("nowhere"),
    }
    make[kind]()
    with pytest.raises(ConfigError, match="is no package"):
        owner.build(out)
