"""The training loop: its arithmetic, what comes out of a run, and what ends one."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from support.models.sited_span import Sited
from support.models.small_training import Turns, Wire, config, data, trainer
from support.models.tiny import tiny_checkpoint
from support.run_folders import adapter, assert_same_run, losses
from transformers import AutoModelForCausalLM

from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.common.errors import ConfigError, DiskError, NonFiniteError
from isthmus.common.progress import StepProgress, duration
from isthmus.common.readable import size
from isthmus.edge.config.schedule import learning_rate, total_steps
from isthmus.edge.data.batches import Batches, Encoded
from isthmus.edge.run_report import WireTotals, count, linear_parameters
from isthmus.edge.training.edge_steps import figures
from isthmus.edge.training.evaluation import evaluate
from isthmus.edge.training.methods import build_peft, trained

# Arithmetic ----------------------------------------------------------------------------------------------------------


def test_the_run_equals_a_loop_written_by_hand(model_folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    options, examples = config(tmp_path), data()
    model = build_peft(AutoModelForCausalLM.from_pretrained(model_folder), options)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=options.learning_rate, weight_decay=0.0, foreach=False)
    torch.manual_seed(options.seed)
    model.train()
    seen = []
    for step in range(9):
        batch = list(Batches(examples.train, 3, 0, options.seed).epoch(step // 3))[step % 3]
        optimizer.param_groups[0]["lr"] = learning_rate(options, step, 9)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained(model).values(), 1.0, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert [line["loss"] for line in losses(undisturbed)] == seen
    saved = adapter(undisturbed)
    for name, parameter in trained(model).items():
        assert torch.equal(saved[name.replace(".default", "")], parameter)
    assert max(float(w.abs().max()) for n, w in saved.items() if "lora_B" in n) > 1e-3


def test_accumulation_equals_a_larger_batch(model_folder: Path, tmp_path: Path) -> None:
    # Seven examples: the last step of an epoch has one micro-batch of one example, so weights by batch would show.
    examples = data(9)
    for name, values in (("one", {"batch": 4}), ("two", {"batch": 2, "accumulate": 2})):
        trainer(model_folder, config(tmp_path / name, epochs=2, steps=None, dropout=0.0, **values), data=examples).fit()
    assert len(losses(tmp_path / "one")) == 4
    one, two = ([line["loss"] for line in losses(tmp_path / name)] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-5)
    ours, theirs = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)


def test_the_number_of_steps() -> None:
    assert total_steps(config(Path("x"), steps=7), 100) == 7
    assert total_steps(config(Path("x"), steps=None, batch=4, accumulate=2), 17) == 3
    assert total_steps(config(Path("x"), steps=None, epochs=3, batch=4), 17) == 15


def test_the_learning_rate() -> None:
    def rates(**values: Any) -> list[float]:
        options = config(Path("x"), learning_rate=1.0, **{"warmup_steps": 2, **values})
        return [round(learning_rate(options, step, 6), 6) for step in range(6)]

    assert rates(schedule="linear") == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates(schedule="constant") == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    cosine = [round((1 + math.cos(math.pi * part)) / 2, 6) for part in (0, 0.25, 0.5, 0.75)]
    assert rates(schedule="cosine") == [0.5, 1.0, *cosine]


def test_evaluation_weights_tokens_not_batches(model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.train()
    examples = [Encoded(tuple(range(5, 5 + n)), (-100, *range(6, 5 + n))) for n in (3, 12, 4)]
    whole = float(evaluate(model, Batches(examples, 3, 0)))
    assert evaluate(model, Batches(examples, 2, 0)) == pytest.approx(whole, rel=1e-5)
    single = [evaluate(model, Batches([example], 1, 0)) for example in examples]
    assert abs(sum(single) / 3 - whole) > 1e-3
    assert model.training


# What comes out ------------------------------------------------------------------------------------------------------


def test_the_adapter_is_a_standard_peft_folder(model_folder: Path, tmp_path: Path) -> None:
    run = trainer(model_folder, config(tmp_path))
    result = run.fit()
    assert result.adapter == tmp_path / "adapter"
    record = json.loads((result.adapter / "isthmus_tuning.json").read_text())
    assert record == {"digest": "d1", "plan": "whole", "method": "lora", "form": "text"}
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), result.adapter)
    ids = torch.tensor([[5, 6, 7, 8]])
    run.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, run.model(ids).logits)


def test_the_report(model_folder: Path, undisturbed: Path) -> None:
    report = json.loads((undisturbed / "report.json").read_text())
    log = losses(undisturbed)
    assert report["loss_after"] < report["loss_before"]
    assert (report["train_loss_first"], report["train_loss_last"]) == (log[0]["loss"], log[-1]["loss"])
    assert (report["steps"], report["examples"], report["method"], report["plan"]) == (9, 9, "lora", "whole")
    assert report["tokens"] == 3 * sum(len(example.input_ids) for example in data().train)
    assert report["positions"] > report["tokens"]
    assert (report["bytes_up"], report["bytes_down"], report["calls"], report["retries"]) == (9000, 4500, 18, 3)
    assert report["bytes_per_token_up"] == pytest.approx(9000 / report["tokens"])
    assert report["bytes_per_position_down"] == pytest.approx(4500 / report["positions"])
    assert sum(report[f"{who}_share"] for who in ("edge", "cloud", "wire", "crypto")) == pytest.approx(1)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    linear = sum(p.numel() for n, p in base.named_parameters() if "proj" in n or "lm_head" in n)
    n_trained = report["trained_parameters"]
    assert n_trained == sum(weight.numel() for weight in adapter(undisturbed).values())
    # The adapter's own matrices are linear layers as well.
    assert report["edge_flops"] == (4 * (linear + n_trained) + 2 * n_trained) * report["positions"]
    assert report["cloud_flops"] == 0
    assert report["peak_bytes_edge"] > 1 << 20
    assert report["peak_bytes_cloud"] is None


def test_totals_have_differences_and_sums() -> None:
    one, two = WireTotals(5, 4, 3, 9, 0.5, 0.25, 1.0, 2), WireTotals(1, 1, 1, 2, 0.25, 0.125, 0.5, 1)
    assert one - two == WireTotals(4, 3, 2, 7, 0.25, 0.125, 0.5, 1)
    assert (one - two) + two == one


def test_the_flops_of_a_split_model_are_those_of_the_weights_that_are_here(tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama", tmp_path)
    edge = load_edge_parts(folder, SplitPlan.parse("1:2", 6), Sited())
    whole = AutoModelForCausalLM.from_pretrained(folder)
    here = [f"model.layers.{layer}." for layer in (0, 4, 5)] + ["lm_head"]
    own = sum(
        p.numel() for n, p in whole.named_parameters() if "proj" in n or "lm_head" in n if n.startswith(tuple(here))
    )
    assert linear_parameters(edge) == own
    tuned = get_peft_model(edge, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert linear_parameters(tuned) == own + count(
        trained(tuned).values()
    )  # what the edge computes for sites is its own
    assert count(trained(tuned).values()) == 6 * 2 * (32 + 32)


def test_a_run_without_validation(model_folder: Path, tmp_path: Path) -> None:
    plain = data()
    bare = type(plain)(plain.train, [], 0, 2, plain.fingerprint)
    options, told = config(tmp_path, steps=2), io.StringIO()
    progress = StepProgress("step", 2, Console(file=told, width=200))
    result = trainer(
        model_folder, options, data=bare, progress=progress, span_parameters=10, cloud_peak=lambda: 77
    ).fit()
    report = result.report
    assert "2 examples are left out: cut to 512 tokens, they have no label" in told.getvalue()
    assert (report.loss_before, report.loss_after, report.dropped_examples) == (None, None, 2)
    assert (report.cloud_flops, report.peak_bytes_cloud) == (40 * report.positions, 77)


def test_tensorboard_gets_the_curves(model_folder: Path, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = config(tmp_path, steps=3, report_to="tensorboard", eval_every=2)
    trainer(model_folder, settings, Wire(), step_observers=[Turns()]).fit()
    log = events.EventAccumulator(str(tmp_path / "tensorboard"))
    log.Reload()
    assert [event.value for event in log.Scalars("loss/train")] == pytest.approx([x["loss"] for x in losses(tmp_path)])
    assert [event.step for event in log.Scalars("loss/validation")] == [0, 2, 3]
    assert [event.value for event in log.Scalars("bytes/up")] == [1000] * 3
    for name in ("turns/begun", "turns/ended"):  # after the step, and after its observers
        assert [(event.step, event.value) for event in log.Scalars(name)] == [(1, 1), (2, 2), (3, 3)]


def test_tensorboard_that_is_missing(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"isthmus\[tensorboard\]"):
        trainer(model_folder, config(tmp_path, report_to="tensorboard")).fit()


def test_progress_in_plain_lines() -> None:
    shown, now = io.StringIO(), [0.0]
    with StepProgress("step", 10, Console(file=shown, width=40), every=5, clock=lambda: now[0]) as progress:
        progress.start(2)
        for step in range(3, 11):
            now[0] += 60.0
            progress.show(step, figures(1.25, 1234.5, WireTotals(bytes_up=3 << 20, bytes_down=512)))
    assert shown.getvalue().splitlines() == [
        "step 5/10  loss 1.2500  1,234 tokens/s  up 3.0 MiB  down 512 B  left 05:00",
        "step 10/10  loss 1.2500  1,234 tokens/s  up 3.0 MiB  down 512 B  left 00:00",
    ]
    assert (size(5 << 40), duration(3723)) == ("5.0 TiB", "1:02:03")


def test_progress_on_a_terminal() -> None:
    shown = io.StringIO()
    with StepProgress("step", 10, Console(file=shown, force_terminal=True, width=120)) as progress:
        progress.start(0)
        progress.show(1, figures(1.25, 10.0, WireTotals()))
    assert "1/10" in shown.getvalue()
    assert "loss 1.2500" in shown.getvalue()


# What is not a number, and a place that cannot be written ------------------------------------------------------------


def poison(run: Any, what: Callable[[torch.Tensor], torch.Tensor], step: int) -> None:
    """From `step` on, the logits are `what` of what they were."""

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return what(output) if run.step + 1 >= step and module.training else output

    run.model.get_base_model().lm_head.register_forward_hook(hook)


class BadGradient(torch.autograd.Function):
    """The identity, with infinite gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * math.inf


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda logits: logits * math.nan, "the loss of step 5 is nan"),
        (BadGradient.apply, "the gradients of step 5 have the norm"),
    ],
)
def test_what_is_not_finite_stops_the_run_with_the_last_good_state(
    model_folder: Path, undisturbed: Path, tmp_path: Path, what: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    run = trainer(model_folder, config(tmp_path))
    poison(run, what, 5)
    with pytest.raises(NonFiniteError, match=rf"{message}.*lower --learning-rate.*checkpoint-4"):
        run.fit()
    assert [line["step"] for line in losses(tmp_path)] == [1, 2, 3, 4]
    trainer(model_folder, config(tmp_path, resume=True)).fit()
    assert_same_run(tmp_path, undisturbed)


def test_a_place_that_cannot_be_written(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be written"):
        trainer(model_folder, config(tmp_path / "file" / "out")).fit()
