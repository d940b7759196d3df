"""Distillation: it lowers the error, goes on to the same bits after a stop, and refuses what differs."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support import older_checkpoints as older
from support.models.tiny import N_LAYERS, VOCAB
from torch import Tensor
from transformers import AutoModelForCausalLM

from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from isthmus.common.files import claim
from isthmus.emulator.compress.emulator_model import Emulator, build_emulator
from isthmus.emulator.compress.public_text import fingerprint
from isthmus.emulator.compress.recipe import Recipe
from isthmus.emulator.distill import distillation as distilling
from isthmus.emulator.distill.distillation import DistillConfig, DistillReport, distill
from isthmus.emulator.distill.loss_figure import loss_figure

from ..conftest import Checkpoints

PLAN = SplitPlan.parse("1:1", N_LAYERS)
CONFIG = DistillConfig(steps=6, batch=4, learning_rate=3e-3, warmup_steps=2, save_every=2)
OF_A_DRAFT = dataclasses.replace(CONFIG, mse_weight=0.0, lm_weight=0.0, kl_weight=1.0)


class Bench:
    """One model and text, distilled as often as a test wants."""

    def __init__(self, checkpoints: Checkpoints, blocks: Tensor, family: str = "llama") -> None:
        self.checkpoint, self.blocks = checkpoints(family), blocks
        self.shown = io.StringIO()

    def emulator(self, recipe: str = "uniform", keep: float = 0.5) -> Emulator:
        return build_emulator(self.checkpoint, PLAN, Recipe.parse(recipe, keep), self.blocks)

    def run(self, emulator: Emulator, folder: Path, config: DistillConfig = CONFIG, **options: Any) -> DistillReport:
        console = Console(file=self.shown, width=200)
        blocks = options.pop("blocks", self.blocks)
        return distill(self.checkpoint, PLAN, emulator, blocks, config, folder, progress=console)


@pytest.fixture
def bench(checkpoints: Checkpoints, blocks: Tensor) -> Bench:
    return Bench(checkpoints, blocks)


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "distill.jsonl").read_text().splitlines()]


def same_weights(one: Emulator, other: Emulator) -> bool:
    pairs = zip(one.tensors().values(), other.tensors().values(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("recipe", ["uniform", "crash", "uniform+lowrank:0.5"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_emulator_comes_nearer_to_the_middle(
    checkpoints: Checkpoints, blocks: Tensor, family: str, recipe: str, tmp_path: Path
) -> None:
    bench = Bench(checkpoints, blocks, family)
    emulator = bench.emulator(recipe)
    report = bench.run(emulator, tmp_path, dataclasses.replace(CONFIG, steps=25, lm_weight=0.0, save_every=100))
    assert report.error_after < 0.9 * report.error_before
    assert (report.steps, report.tokens, report.text) == (25, 25 * 4 * 16, fingerprint(blocks))
    assert log_of(tmp_path)[0]["lm"] is None
    assert not any(parameter.requires_grad for parameter in emulator.parameters())
    assert [line["step"] for line in log_of(tmp_path)] == list(range(1, 26))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_draft_comes_nearer_to_what_the_whole_model_says(
    checkpoints: Checkpoints, family: str, tmp_path: Path
) -> None:
    blocks = torch.randint(3, VOCAB, (640, 16), generator=torch.Generator().manual_seed(6))
    bench = Bench(checkpoints, blocks, family)
    config = dataclasses.replace(OF_A_DRAFT, steps=40, batch=16, save_every=100)
    report = bench.run(bench.emulator(), tmp_path, config)
    assert report.kl_before is not None
    assert report.kl_after is not None
    assert 0 < report.kl_after < 0.8 * report.kl_before
    assert report.agreement_before is not None
    assert report.agreement_after is not None
    assert report.agreement_before <= report.agreement_after <= 1
    first, *_, last = log_of(tmp_path)
    assert last["kl"] < first["kl"] == first["loss"]
    assert first["lm"] is None
    assert f"kl {last['kl']:.4f}" in bench.shown.getvalue()
    shown = bench.shown.getvalue().splitlines()  # held-out text is measured before the steps and after them
    begun = [at for at, line in enumerate(shown) if line.endswith(" to do")]
    assert [shown[at] for at in begun] == [shown[0]] * 2
    assert shown[0].startswith("measuring held-out blocks: ")
    assert any(f"kl {last['kl']:.4f}" in line for line in shown[: begun[1]])


def test_a_margin_raises_the_emulators_loss_above_the_models(bench: Bench, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=40, batch=8, learning_rate=1e-2, save_every=100)
    plain, raised = tmp_path / "plain", tmp_path / "raised"
    bench.run(bench.emulator(), plain, config)
    bench.run(bench.emulator(), raised, dataclasses.replace(config, mse_weight=0.0, loss_margin=1.0))
    assert log_of(raised)[-1]["lm"] > log_of(plain)[-1]["lm"] + 0.5


def test_without_divergence_no_figure_of_it_is_stated(bench: Bench, tmp_path: Path) -> None:
    report = bench.run(bench.emulator(), tmp_path)
    assert (report.kl_before, report.kl_after, report.agreement_before, report.agreement_after) == (None,) * 4
    assert log_of(tmp_path)[0]["kl"] is None
    # A checkpoint of a time without divergence is one without divergence.
    assert "kl_weight" not in json.loads((tmp_path / "checkpoint-6" / "state.json").read_text())["settings"]


def test_the_figures_of_held_out_text_are_those_of_the_whole_model(bench: Bench, tmp_path: Path) -> None:
    emulator = bench.emulator()
    held_out = bench.blocks[torch.randperm(48, generator=torch.Generator().manual_seed(0))[:2]]
    whole = AutoModelForCausalLM.from_pretrained(bench.checkpoint.folder)
    with torch.no_grad():
        wanted = whole(held_out).logits
        layers = whole.model.layers
        whole.model.layers = torch.nn.ModuleList([layers[0], *(layers[i] for i in emulator.layers), layers[5]])
        said = whole(held_out, use_cache=False).logits
    report = bench.run(emulator, tmp_path, dataclasses.replace(OF_A_DRAFT, steps=1))
    p, q = wanted.double().softmax(-1), said.double().softmax(-1)
    assert report.kl_before == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    assert report.agreement_before == (wanted.argmax(-1) == said.argmax(-1)).double().mean().item()


def test_the_first_loss_is_the_objective_that_is_described(bench: Bench, tmp_path: Path) -> None:
    emulator = bench.emulator()
    config = dataclasses.replace(CONFIG, steps=1, batch=46, mse_weight=30.0, lm_weight=0.5)
    held_out = torch.randperm(48, generator=torch.Generator().manual_seed(0))[:2]
    used = bench.blocks[[i for i in range(48) if i not in held_out.tolist()]]
    whole = AutoModelForCausalLM.from_pretrained(bench.checkpoint.folder)
    with torch.no_grad():
        layers = whole.model.layers
        states: dict[str, Tensor] = {}
        hook = layers[4].register_forward_hook(lambda _m, _i, output: states.update(teacher=output))
        of_model = whole(used, labels=used)
        wanted, best = of_model.logits, of_model.loss.item()
        hook.remove()
        whole.model.layers = torch.nn.ModuleList([layers[0], *(layers[i] for i in emulator.layers), layers[5]])
        whole.model.layers[2].register_forward_hook(lambda _m, _i, output: states.update(student=output))
        output = whole(used, labels=used, use_cache=False)
        lm = output.loss.item()
        p, q = wanted.double().softmax(-1), output.logits.double().softmax(-1)
        kl = (p * (p / q).log()).sum(-1).mean().item()
    difference = states["teacher"] - states["student"]
    of_all = states["teacher"].square().mean().sqrt()
    of_each = states["teacher"].square().mean(-1, keepdim=True).sqrt()
    error = sum((difference / rms).square().mean().item() for rms in (of_all, of_each)) / 2
    bench.run(emulator, tmp_path, config)
    first = log_of(tmp_path)[0]
    assert first["error"] == pytest.approx(error, rel=1e-4)
    assert first["lm"] == pytest.approx(lm, rel=1e-4)
    assert first["loss"] == pytest.approx(30 * error + 0.5 * lm, rel=1e-4)

    # With a margin, the emulator's loss is to be so far above the model's, and is not to fall.
    bench.run(bench.emulator(), tmp_path / "raised", dataclasses.replace(config, mse_weight=0.0, loss_margin=2.0))
    first = log_of(tmp_path / "raised")[0]
    assert first["lm"] == pytest.approx(lm, rel=1e-4)
    assert first["loss"] == pytest.approx(0.5 * (lm - best - 2) ** 2, rel=1e-3)

    # The same in two micro-batches, as logits take much memory.
    bench.run(bench.emulator(), tmp_path / "kl", dataclasses.replace(config, mse_weight=0.0, kl_weight=2.0))
    first = log_of(tmp_path / "kl")[0]
    assert (first["lm"], first["kl"]) == (pytest.approx(lm, rel=1e-4), pytest.approx(kl, rel=1e-4))
    assert first["loss"] == pytest.approx(0.5 * lm + 2 * kl, rel=1e-4)


def test_micro_batches_have_the_gradient_of_the_whole_batch(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(OF_A_DRAFT, steps=1, batch=6)
    bench.run(bench.emulator(), tmp_path / "one", config)
    monkeypatch.setattr(distilling, "_LOGIT_TOKENS", 4 * 16)  # the second micro-batch is smaller
    bench.run(bench.emulator(), tmp_path / "two", config)
    one, two = (log_of(tmp_path / name)[0] for name in ("one", "two"))
    for name in ("kl", "loss", "grad_norm"):
        assert two[name] == pytest.approx(one[name], rel=1e-4)


def test_without_cross_entropy_nothing_above_the_middle_runs(bench: Bench, tmp_path: Path) -> None:
    seen: list[str] = []
    keep_forward = torch.nn.Linear.forward

    def forward(module: torch.nn.Linear, x: Tensor) -> Tensor:
        seen.append(f"{module.in_features}:{module.out_features}")
        return keep_forward(module, x)

    for weight, head in ((0.0, 0), (1.0, 1)):
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.Linear, "forward", forward)
            bench.run(bench.emulator(), tmp_path / str(weight), dataclasses.replace(CONFIG, steps=1, lm_weight=weight))
        assert seen.count("32:259") == head


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, how: str) -> None:
    """Have step number `step` end in a signal, or in an error, before it is applied."""
    measure, compare = distilling._Distillation.measure, distilling._Distillation._compare

    def act(task: Any, number: int) -> Any:
        if number == step:
            monkeypatch.setattr(distilling._Distillation, "measure", measure)
            if how == "nan":
                broken = distilling._Compared(torch.tensor(math.nan))
                monkeypatch.setattr(distilling._Distillation, "_compare", lambda *_, **__: broken)
            else:
                os.kill(os.getpid(), signal.SIGTERM if how == "term" else signal.SIGINT)
        return measure(task, number)

    monkeypatch.setattr(distilling._Distillation, "measure", act)
    monkeypatch.setattr(distilling._Distillation, "_compare", compare)


@pytest.mark.parametrize(
    ("how", "step", "config"), [("int", 4, CONFIG), ("term", 1, CONFIG), ("int", 6, CONFIG), ("int", 4, OF_A_DRAFT)]
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, step: int, config: DistillConfig
) -> None:
    undisturbed = bench.emulator("crash")
    expected = bench.run(undisturbed, tmp_path / "one", config)
    interrupt_at(monkeypatch, step, how)
    with pytest.raises(KeyboardInterrupt, match=rf"Stopped after step {step - 1} of 6.*repeat the command to go on"):
        bench.run(bench.emulator("crash"), tmp_path / "two", config)
    assert [path.name for path in (tmp_path / "two").glob("checkpoint-*")] == [f"checkpoint-{step - 1}"]
    emulator = bench.emulator("crash")
    report = bench.run(emulator, tmp_path / "two", config)
    assert f"Resumed after step {step - 1} of 6" in bench.shown.getvalue()
    assert same_weights(emulator, undisturbed)
    assert report == expected
    assert (tmp_path / "two" / "distill.jsonl").read_bytes() == (tmp_path / "one" / "distill.jsonl").read_bytes()


def test_a_checkpoint_of_format_1_is_gone_on_with(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = bench.emulator("crash")
    expected = bench.run(undisturbed, tmp_path / "one")
    interrupt_at(monkeypatch, 4, "int")
    with pytest.raises(KeyboardInterrupt):
        bench.run(bench.emulator("crash"), tmp_path / "two")
    older.rewrite_distillation(tmp_path / "two" / "checkpoint-3")
    emulator = bench.emulator("crash")
    assert bench.run(emulator, tmp_path / "two") == expected
    assert same_weights(emulator, undisturbed)
    assert log_of(tmp_path / "two") == log_of(tmp_path / "one")


def test_a_finished_run_is_only_loaded(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator = bench.emulator()
    expected = bench.run(emulator, tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    monkeypatch.setattr(distilling._Distillation, "measure", None)
    again = bench.emulator()
    assert bench.run(again, tmp_path) == expected
    assert same_weights(again, emulator)


def test_a_loss_that_is_not_finite_ends_the_run_with_the_last_step_saved(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 4, "nan")
    emulator = bench.emulator()
    with pytest.raises(NonFiniteError, match=r"loss of step 4 is nan.*checkpoint-3"):
        bench.run(emulator, tmp_path)
    assert all(weight.isfinite().all() for weight in emulator.tensors().values())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"config": dataclasses.replace(CONFIG, learning_rate=1e-3)}, "learning_rate was 0.003 and is now 0.001"),
        ({"config": dataclasses.replace(CONFIG, steps=7)}, "steps was 6 and is now 7"),
        ({"config": dataclasses.replace(CONFIG, kl_weight=0.5)}, "kl_weight was None and is now 0.5"),
        ({"blocks": slice(1, None)}, "the text \\(fingerprint\\)"),
        ({"recipe": "crash-drop"}, "the recipe was 'uniform' and is now 'crash-drop'|the choice of layers"),
    ],
)
def test_another_run_is_not_gone_on_with(bench: Bench, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    bench.run(bench.emulator(), tmp_path)
    options = {} if "blocks" not in change else {"blocks": bench.blocks[change["blocks"]]}
    with pytest.raises(CheckpointError, match=says):
        bench.run(bench.emulator(change.get("recipe", "uniform")), tmp_path, change.get("config", CONFIG), **options)


@pytest.mark.parametrize("name", ["parameters.safetensors", "optimizer.safetensors", "distill.jsonl", "state.json"])
def test_a_damaged_checkpoint_is_refused(bench: Bench, tmp_path: Path, name: str) -> None:
    bench.run(bench.emulator(), tmp_path, dataclasses.replace(CONFIG, steps=2))
    path = tmp_path / "checkpoint-2" / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        bench.run(bench.emulator(), tmp_path, dataclasses.replace(CONFIG, steps=2))


def test_two_runs_do_not_share_a_folder(bench: Bench, tmp_path: Path) -> None:
    with claim(tmp_path), pytest.raises(ConfigError, match="another process"):
        bench.run(bench.emulator(), tmp_path)


def test_too_little_text_is_refused(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 block of 16 tokens"):
        bench.run(bench.emulator(), tmp_path, blocks=bench.blocks[:1])


def test_bf16_is_another_computation_on_the_same_weights_dtype(bench: Bench, tmp_path: Path) -> None:
    emulator = bench.emulator()
    bench.run(emulator, tmp_path / "bf16", dataclasses.replace(CONFIG, precision="bf16"))
    bench.run(bench.emulator(), tmp_path / "fp32")
    assert emulator.dtype == torch.float32
    bf16, exact = (log_of(tmp_path / name)[0]["loss"] for name in ("bf16", "fp32"))
    assert bf16 != exact
    assert bf16 == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"batch": 0}, "batch = 0"),
        ({"learning_rate": math.nan}, "learning_rate = nan"),
        ({"lm_weight": -1.0}, "lm_weight = -1.0"),
        ({"kl_weight": math.inf}, "kl_weight = inf"),
        ({"lm_weight": 0.0, "mse_weight": 0.0}, "all 0"),
        ({"precision": "fp64"}, "'fp64'"),
        ({"loss_margin": math.nan}, "loss_margin = nan"),
        ({"loss_margin": 1.0, "lm_weight": 0.0}, "an lm_weight above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DistillConfig(**{"steps": 5, **values})


def test_the_rate_rises_and_falls_to_a_tenth() -> None:
    config = DistillConfig(steps=100, learning_rate=1.0, warmup_steps=10)
    rates = [config.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert all(later <= earlier for earlier, later in pairwise(rates[9:]))
    assert config.rate(100) == pytest.approx(0.1)


@pytest.mark.parametrize(("config", "panels"), [(CONFIG, 2), (OF_A_DRAFT, 2)])
def test_the_loss_figure_is_drawn(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: DistillConfig, panels: int
) -> None:
    plot = pytest.importorskip("matplotlib.pyplot")
    asked: list[int] = []
    subplots = plot.subplots
    monkeypatch.setattr(plot, "subplots", lambda n, **options: [asked.append(n), subplots(n, **options)][1])
    bench.run(bench.emulator(), tmp_path, config)
    loss_figure(tmp_path, tmp_path / "figures" / "loss.png")
    assert (tmp_path / "figures" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert asked == [panels]
    with pytest.raises(DataError, match="no log"):
        loss_figure(tmp_path / "nothing", tmp_path / "x.png")


@pytest.mark.parametrize("entry", ["step", "kl_before"])
def test_a_state_that_makes_no_sense_is_refused(bench: Bench, tmp_path: Path, entry: str) -> None:
    bench.run(bench.emulator(), tmp_path, OF_A_DRAFT)
    (state,) = tmp_path.glob("checkpoint-*/state.json")
    state.write_text(json.dumps(json.loads(state.read_text()) | {entry: "many"}))
    with pytest.raises(CheckpointError, match="damaged"):
        bench.run(bench.emulator(), tmp_path, OF_A_DRAFT)
