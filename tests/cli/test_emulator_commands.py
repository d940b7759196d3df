from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.packages import tuned
from support.models.tiny import tiny_checkpoint
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from isthmus.backbone.adapters.adapter_files import load_adapter
from isthmus.backbone.plan import SplitPlan
from isthmus.cli.emulator_commands import app
from isthmus.common.errors import (
    AdapterError,
    ConfigError,
    DataError,
    IsthmusError,
    KeyFileError,
    PackageError,
    PlanError,
    SignerError,
)
from isthmus.emulator.compress.recipe import Recipe
from isthmus.emulator.distill.distillation import DistillConfig
from isthmus.emulator.package.package import open_package
from isthmus.protocol.secure.keys import generate_root, issue_worker, load_worker

IDS = torch.tensor([[5, 9, 33, 120, 7, 2]])


class Owner:
    """A model, keys, public text, and the way to run commands there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny_checkpoint("llama", folder / "model")
        self.home = folder / "home"
        generate_root(self.home)
        issue_worker(self.home)
        self.pin = str(load_worker(self.home).pin)
        self.text = folder / "public.txt"
        self.text.write_text("".join(f"The {i}th of the lines counts {i * i} things.\n" for i in range(60)))

    def run(self, *arguments: object) -> str:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.stdout

    def build_arguments(self, out: Path, *more: object) -> list[object]:
        where = ["--home", self.home, "--adapter-layers", "1:1", "--device", "cpu"]
        return ["build", "--model", self.model, "--out", out, "--licence", "tuning only", *where, *more]

    def build(self, out: Path, *more: object) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(self.run(*self.build_arguments(out, *more, "--json")))
        return said

    def distil_arguments(self, steps: int = 3) -> list[object]:
        return ["--distill", self.text, "--distill-steps", steps, "--batch", 2, "--length", 32]

    def tune(self, package: Path, out: Path, method: str = "lora") -> Path:
        return tuned(open_package(package), out, method)


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Owner:
    return Owner(tmp_path_factory.mktemp("owner"))


@pytest.fixture(scope="module")
def package(owner: Owner) -> Path:
    owner.build(owner.folder / "package")
    return owner.folder / "package"


# build ----------------------------------------------------------------------------------------------------------------


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
    said = owner.build(tmp_path / "p", *owner.distil_arguments(), "--lm-weight", 0)
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
        ([], (30.0, 1.0, 0.0), 2),
        (["--kl-weight", 0.5], (30.0, 1.0, 0.5), 2),
        (["--draft"], (0.0, 0.0, 1.0), 3),
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


# verify and sign ------------------------------------------------------------------------------------------------------


def table(package: Path, folder: Path, **changes: Any) -> Path:
    emulator = open_package(package).manifest.files["emulator.safetensors"].sha256
    scores = {"full_zero_shot": 4.0, "plug_in": 2.2, "thief": 3, "plug_in_recovery": 0.9, "thief_recovery": 0.5}
    row = {"task": "e2e", "metric": "nats", "emulator": emulator, "seeds": [0, 1], **scores, **changes}
    path = folder / "table.json"
    path.write_text(json.dumps({"runs": [row]}))
    return path


def test_figures_are_signed_and_shown(owner: Owner, package: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "p"))
    assert "not measured" in owner.run("verify", "--package", copy)
    owner.run("sign", "--package", copy, "--protection", table(copy, tmp_path), "--home", owner.home)
    shown = owner.run("verify", "--package", copy)
    assert "e2e (nats): plug-in 2.2, thief 3" in shown
    assert "recovered 90% by plug-in, 50% by a thief (seeds: 2)" in shown


def test_figures_of_another_emulator_are_not_signed(owner: Owner, package: Path, tmp_path: Path) -> None:
    before = open_package(package).id
    with pytest.raises(PackageError, match="measured with"):
        owner.run(
            "sign",
            "--package",
            package,
            "--protection",
            table(package, tmp_path, emulator="00" * 32),
            "--home",
            owner.home,
        )
    assert open_package(package).id == before


@pytest.mark.parametrize("text", ["", "3", '{"runs": 3}', "[3]"])
def test_a_table_that_is_none_is_named(owner: Owner, package: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(DataError, match=r"table\.json"):
        owner.run("sign", "--package", package, "--protection", tmp_path / "table.json", "--home", owner.home)


def test_a_tampered_package_and_a_wrong_signer_are_refused(owner: Owner, package: Path, tmp_path: Path) -> None:
    with pytest.raises(SignerError):
        owner.run("verify", "--package", package, "--signer", "SHA256:" + "A" * 43)
    with pytest.raises(ConfigError, match="is not a fingerprint"):
        owner.run("verify", "--package", package, "--signer", "nonsense")
    copy = Path(shutil.copytree(package, tmp_path / "p"))
    (copy / "config.json").write_text((copy / "config.json").read_text().replace("32", "33", 1))
    with pytest.raises(PackageError, match=r"config\.json"):
        owner.run("verify", "--package", copy)


def test_a_licence_cannot_move_the_cursor(owner: Owner, tmp_path: Path) -> None:
    owner.run(*owner.build_arguments(tmp_path / "p", "--licence", "free\x1b[2J\nid  forged"))
    shown = owner.run("verify", "--package", tmp_path / "p")
    assert "\x1b" not in shown
    assert [line for line in shown.splitlines() if line.startswith("id ")] == [
        f"id{'':15}{open_package(tmp_path / 'p').id}"
    ]


# plug -----------------------------------------------------------------------------------------------------------------


def test_a_returned_adapter_becomes_a_model(owner: Owner, package: Path, tmp_path: Path) -> None:
    adapter = owner.tune(package, tmp_path / "adapter")
    where = ["--model", owner.model, "--package", package, "--adapter", adapter]
    said = json.loads(owner.run("plug", *where, "--out", tmp_path / "tuned", "--json"))
    assert (said["kind"], said["method"]) == ("model", "lora")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").eval()
    whole = load_adapter(AutoModelForCausalLM.from_pretrained(owner.model).eval(), adapter)
    with torch.no_grad():
        torch.testing.assert_close(tuned(IDS).logits, whole(IDS).logits, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="is not overwritten"):
        owner.run("plug", *where, "--out", tmp_path / "tuned")


def test_a_bottleneck_stays_an_adapter_and_the_command_says_so(owner: Owner, package: Path, tmp_path: Path) -> None:
    adapter = owner.tune(package, tmp_path / "adapter", "bottleneck")
    where = ["--model", owner.model, "--package", package, "--adapter", adapter]
    said = owner.run("plug", *where, "--out", tmp_path / "tuned")
    assert "bottleneck is no part of the architecture" in said
    assert (tmp_path / "tuned" / "adapter" / "isthmus_adapter.json").is_file()


def test_a_package_of_another_model_is_refused(owner: Owner, package: Path, tmp_path: Path) -> None:
    adapter = owner.tune(package, tmp_path / "adapter")
    other = tiny_checkpoint("llama", tmp_path / "other", seed=1)
    with pytest.raises(PackageError, match="digest"):
        owner.run("plug", "--model", other, "--package", package, "--adapter", adapter, "--out", tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


def test_an_adapter_of_another_package_is_refused(owner: Owner, package: Path, tmp_path: Path) -> None:
    owner.build(tmp_path / "other", "--keep", 0.75)
    adapter = owner.tune(tmp_path / "other", tmp_path / "adapter")
    where = ["--model", owner.model, "--package", package, "--adapter", adapter]
    with pytest.raises(AdapterError, match="tuned on the package"):
        owner.run("plug", *where, "--out", tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


# sample ---------------------------------------------------------------------------------------------------------------


def test_the_model_writes_text_that_an_emulator_is_built_by(owner: Owner, tmp_path: Path) -> None:
    where = ["--model", owner.model, "--device", "cpu", "--tokens", 300, "--length", 40, "--batch", 4]
    said = json.loads(owner.run("sample", *where, "--out", tmp_path / "text.jsonl", "--json"))
    rows = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    assert len(rows) == said["texts"] > 0
    assert all(row.keys() == {"text"} for row in rows)
    owner.run("sample", *where, "--out", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "text.jsonl").read_bytes()
    built = owner.build(tmp_path / "p", "--method", "importance", "--text", tmp_path / "text.jsonl", "--length", 16)
    assert built["recipe"] == "importance"


def test_an_interrupted_sample_keeps_what_was_written(
    owner: Owner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isthmus.emulator.distill import sampled_text

    write = sampled_text._write
    rounds: list[int] = []

    def interrupted(*arguments: Any) -> Any:
        rounds.append(1)
        if len(rounds) > 1:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(sampled_text, "_write", interrupted)
    where = ["--model", owner.model, "--device", "cpu", "--tokens", 300, "--length", 40, "--batch", 4]
    arguments = ["sample", *where, "--out", tmp_path / "text.jsonl"]
    stopped = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert stopped.exit_code == 130
    n_rows = len((tmp_path / "text.jsonl").read_text().splitlines())
    assert n_rows > 0
    assert f"has {n_rows} texts, which can be used" in stopped.output


@pytest.mark.parametrize(("name", "message"), [("model", "is not overwritten"), ("text.txt", r"ends in \.jsonl")])
def test_text_does_not_replace_anything(owner: Owner, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match=message):
        owner.run("sample", "--model", owner.model, "--out", tmp_path / name)
    assert not (tmp_path / "text.txt").exists()


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, isthmus.cli.emulator_commands; print({'torch', 'transformers', 'cryptography'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
