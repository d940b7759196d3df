"""The training loop: its arithmetic, and that nothing which stops it is lost or done twice."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from support import older_checkpoints as older
from support.models import small_training as training
from support.models.sited_span import Sited
from support.models.small_training import Wire, config, data, trainer
from support.models.tiny import tiny_checkpoint
from support.run_folders import adapter, assert_same_run, losses
from support.warm_processes import warm
from transformers import AutoModelForCausalLM

from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.common.errors import CheckpointError, ConfigError, DiskError, NonFiniteError, UnreachableError
from isthmus.common.files import claim
from isthmus.common.progress import StepProgress, duration
from isthmus.common.readable import size
from isthmus.edge.config.schedule import learning_rate, total_steps
from isthmus.edge.data.batches import Batches, Encoded
from isthmus.edge.run_report import WireTotals, count, linear_parameters
from isthmus.edge.training.edge_steps import figures
from isthmus.edge.training.evaluation import evaluate
from isthmus.edge.training.methods import build_peft, trained
from isthmus.edge.training.run_identity import ModelIdentity
from isthmus.training import run_checkpoint as checkpoints


@pytest.fixture(scope="module")
def undisturbed(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("undisturbed")
    trainer(model_folder, config(out), Wire()).fit()
    return out


def checkpoint_names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if "checkpoint" in path.name)


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
    result = trainer(
        model_folder, config(tmp_path, steps=2), data=bare, span_parameters=10, cloud_peak=lambda: 77
    ).fit()
    report = result.report
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


# Around a step -------------------------------------------------------------------------------------------------------


class Turns:
    """An observer whose state changes within a step, and which may fail before one."""

    def __init__(self, fail_before: int = 0) -> None:
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.graded: list[bool] = []
        self.parameters: list[torch.nn.Parameter] = []
        self._fail_before = fail_before

    def before_step(self, step: int) -> None:
        self.begun.append(step)
        if step == self._fail_before:
            raise_unreachable()

    def after_step(self, step: int) -> None:
        self.ended.append(step)
        self.graded.append(all(parameter.grad is not None for parameter in self.parameters))

    def points(self) -> dict[str, float]:
        return {"turns/begun": len(self.begun), "turns/ended": len(self.ended)}

    def state(self) -> dict[str, Any]:
        return {"begun": self.begun, "ended": self.ended}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.begun, self.ended = list(state["begun"]), list(state["ended"])


def test_observers_are_called_around_every_step(model_folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    first, second = Turns(), Turns()
    run = trainer(model_folder, config(tmp_path), Wire(), step_observers=(first, second))
    first.parameters = list(trained(run.model).values())
    run.fit()
    for observer in (first, second):
        assert observer.begun == observer.ended == list(range(1, 10))
    assert all(first.graded)
    assert_same_run(tmp_path, undisturbed)
    for step in (6, 9):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "state.json").read_text())
        steps = list(range(1, step + 1))
        assert state["observers"] == [{"begun": steps, "ended": steps}] * 2


@pytest.mark.parametrize("where", ["observer", "wire"])
def test_the_state_of_observers_comes_back_on_a_resume(
    model_folder: Path, undisturbed: Path, tmp_path: Path, where: str
) -> None:
    """It is that of the last applied step, whatever the observer did in the step that was given up."""
    observer = Turns(fail_before=5 if where == "observer" else 0)
    run = trainer(model_folder, config(tmp_path), Wire(), step_observers=[observer])
    if where == "wire":
        run.model.get_base_model().lm_head.register_forward_hook(
            lambda *_: raise_unreachable() if run.step == 4 else None
        )
    with pytest.raises(UnreachableError, match="checkpoint-4"):
        run.fit()
    assert observer.begun == [1, 2, 3, 4, 5]
    again = Turns()
    trainer(model_folder, config(tmp_path, resume=True), Wire(), step_observers=[again]).fit()
    assert again.begun == again.ended == list(range(1, 10))
    assert_same_run(tmp_path, undisturbed)


def test_a_resumed_run_has_the_same_observers(model_folder: Path, tmp_path: Path) -> None:
    trainer(model_folder, config(tmp_path, steps=2), step_observers=[Turns()]).fit()
    with pytest.raises(CheckpointError, match=r"1 observers have left .* this run has 0"):
        trainer(model_folder, config(tmp_path, steps=2, resume=True)).fit()


# Stopping and going on -----------------------------------------------------------------------------------------------


def raise_unreachable() -> None:
    raise UnreachableError("the cloud stayed away for 600 s.")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(
    model_folder: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    wire = Wire("begin", 5, lambda: signal.raise_signal(number))
    with pytest.raises(KeyboardInterrupt, match=r"after step 4 of 9.*checkpoint-4.*--resume"):
        trainer(model_folder, config(tmp_path), wire).fit()
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert [line["step"] for line in losses(tmp_path)] == [1, 2, 3, 4]
    wire = Wire()
    trainer(model_folder, config(tmp_path, resume=True), wire).fit()
    assert wire.steps == [5, 6, 7, 8, 9]
    assert_same_run(tmp_path, undisturbed)


def test_a_second_signal_stops_at_once(model_folder: Path, tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="at once"):
        trainer(model_folder, config(tmp_path), Wire("begin", 5, twice)).fit()
    assert checkpoint_names(tmp_path) == ["checkpoint-3"]


def test_a_cloud_that_stays_away(model_folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match=r"stayed away for 600 s\. .*checkpoint-4.*--resume"):
        trainer(model_folder, config(tmp_path), Wire("begin", 5, raise_unreachable)).fit()
    trainer(model_folder, config(tmp_path, resume=True), Wire()).fit()
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize(
    ("moment", "step", "left"),
    [
        ("begin", 5, ["checkpoint-3"]),  # inside a step
        ("applied", 5, ["checkpoint-3"]),  # after the optimizer, before the loss log
        ("save", 6, [".isthmus-tmp-checkpoint-6", "checkpoint-3"]),  # inside a checkpoint
        ("begin", 2, []),  # before the first checkpoint
    ],
)
def test_a_killed_edge_goes_on_as_if_nothing_had_been(
    model_folder: Path, undisturbed: Path, tmp_path: Path, *, moment: str, step: int, left: list[str]
) -> None:
    words = (str(model_folder), str(tmp_path), moment, str(step))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = warm().run(words, environment, tmp_path, 240, program=training.__file__)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint_names(tmp_path) == left
    trainer(model_folder, config(tmp_path, resume=True), Wire()).fit()
    assert_same_run(tmp_path, undisturbed)
    assert checkpoint_names(tmp_path) == ["checkpoint-6", "checkpoint-9"]


def test_a_finished_run_can_be_resumed(model_folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    first = trainer(model_folder, config(tmp_path), Wire()).fit()
    wire = Wire()
    again = trainer(model_folder, config(tmp_path, resume=True), wire).fit()
    assert wire.steps == []
    assert (again.report.tokens, again.report.seconds) == (first.report.tokens, first.report.seconds)
    assert_same_run(tmp_path, undisturbed)


def test_a_folder_is_trained_into_by_one_process_at_a_time(model_folder: Path, tmp_path: Path) -> None:
    other = trainer(model_folder, config(tmp_path, resume=True))
    with claim(tmp_path), pytest.raises(ConfigError, match=r"another process is training.*another --out"):
        other.fit()
    assert not (tmp_path / "losses.jsonl").exists()
    assert other.fit().report.steps == 9


def test_a_signal_ends_a_wait_for_the_cloud(model_folder: Path, tmp_path: Path) -> None:
    """As the link does while the cloud is away: it asks again and again whether the wait is still wanted."""
    asked: list[int] = []

    def wait() -> None:
        for number in range(10):
            asked.append(number)
            run.check_stop()
            if number == 3:
                signal.raise_signal(signal.SIGTERM)

    run = trainer(model_folder, config(tmp_path), Wire("begin", 5, wait))
    with pytest.raises(KeyboardInterrupt, match=r"after step 4 of 9.*checkpoint-4.*--resume"):
        run.fit()
    assert asked == [0, 1, 2, 3, 4]
    run.check_stop()  # a request counts for its own run only


def test_a_folder_with_a_run_is_not_overwritten(model_folder: Path, tmp_path: Path) -> None:
    trainer(model_folder, config(tmp_path, steps=2)).fit()
    before = (tmp_path / "losses.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"checkpoint-2.*--resume"):
        trainer(model_folder, config(tmp_path, steps=2)).fit()
    assert (tmp_path / "losses.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 4}, "rank was 8 and is now 4"),
        ({"learning_rate": 1e-3}, "learning_rate was 0.01"),
        ({"steps": 10}, "total steps was 9 and is now 10"),
        ({"identity": ModelIdentity("other", "d1", "whole")}, "the model was 'tiny' and is now 'other'"),
        ({"data": data(12)}, "the tokenized data"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    model_folder: Path, undisturbed: Path, change: dict[str, Any], message: str
) -> None:
    keywords = {name: change[name] for name in ("identity", "data") if name in change}
    options = config(
        undisturbed, resume=True, **{name: value for name, value in change.items() if name not in keywords}
    )
    with pytest.raises(CheckpointError, match=message):
        trainer(model_folder, options, **keywords).fit()


def test_a_constant_schedule_can_be_made_longer(model_folder: Path, tmp_path: Path) -> None:
    for steps, name in ((4, "grown"), (7, "grown"), (7, "straight")):
        trainer(model_folder, config(tmp_path / name, steps=steps, schedule="constant", resume=True)).fit()
    assert_same_run(tmp_path / "grown", tmp_path / "straight")


@pytest.mark.parametrize("values", [{}, {"method": "adalora", "steps": 12}, {"optimizer": "lora-fa"}])
def test_a_checkpoint_of_the_loop_before_is_resumed(model_folder: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    trainer(model_folder, config(tmp_path / "straight", **values), Wire(), step_observers=[Turns()]).fit()
    wire = Wire("begin", 5, raise_unreachable)
    with pytest.raises(UnreachableError):
        trainer(model_folder, config(tmp_path / "run", **values), wire, step_observers=[Turns()]).fit()
    older.rewrite_edge(tmp_path / "run" / "checkpoint-4", epoch=1, position=1, learning_rate=1e-3)
    resumed = config(tmp_path / "run", resume=True, **values)
    trainer(model_folder, resumed, Wire(), step_observers=[Turns()]).fit()
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def test_a_checkpoint_of_other_layers_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    larger = tiny_checkpoint("llama", tmp_path / "larger", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="has shape None there"):
        trainer(larger, config(undisturbed, resume=True)).fit()


# What is not a number, and a full disk -------------------------------------------------------------------------------


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


def test_a_full_disk_loses_nothing(
    model_folder: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoints.save_file

    def full(tensors: Any, path: Path) -> None:
        if "checkpoint-6" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        with pytest.raises(DiskError, match=r"checkpoint-6 cannot be written \(No space left on device\)"):
            trainer(model_folder, config(tmp_path)).fit()
    assert checkpoint_names(tmp_path) == ["checkpoint-3"]
    trainer(model_folder, config(tmp_path, resume=True)).fit()
    assert_same_run(tmp_path, undisturbed)


def test_a_place_that_cannot_be_written(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be written"):
        trainer(model_folder, config(tmp_path / "file" / "out")).fit()
