"""The steps of edge training. They know nothing of where the model's middle layers run.

One optimizer step draws `accumulate` micro-batches (fewer at an epoch's end: a step never spans two epochs), or, where
a defence draws the examples by chance, as many as hold these, perhaps none. The rule of
`isthmus.edge.training.step_rule` measures and moves. A step's loss is the mean over all its labels, whatever the
micro-batches' sizes, and 0 without any.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from isthmus.backbone.adapters.adapter_files import adapter_digest
from isthmus.common.errors import CheckpointError
from isthmus.common.files import disk_errors
from isthmus.common.progress import StepProgress
from isthmus.common.readable import size
from isthmus.common.shutdown import StopRequest
from isthmus.edge.config.schedule import learning_rate, steps_per_epoch, total_steps
from isthmus.edge.config.training_config import TuningConfig
from isthmus.edge.data.batches import Batch, Batches, TrainingData
from isthmus.edge.run_files.run_identity import (
    NO_DRAFT,
    ModelIdentity,
    check_fits,
    fixed_settings,
    identity_entries,
    noted_settings,
)
from isthmus.edge.run_files.tensorboard_curves import AddPoints, no_curves
from isthmus.edge.run_report import Spent, WireMeter, WireTotals
from isthmus.edge.training import methods
from isthmus.edge.training.defended_run import DefendedRun
from isthmus.edge.training.draft_tuning import DraftTuning
from isthmus.edge.training.evaluation import evaluate
from isthmus.edge.training.micro_batches import InFlight
from isthmus.edge.training.optimizers import step_rule
from isthmus.edge.training.run_listener import RunListener, SaveAdapter, accuracy_for
from isthmus.edge.training.step_rule import EdgeRule
from isthmus.training.run_checkpoint import RunCheckpoint, damaged_entry
from isthmus.training.training_loop import Task

COSTS_FILE = "costs.jsonl"
"""A JSON line for each step with its `seconds`, `tokens`, `bytes_up` and `bytes_down`. The log has none of it, as it is
the same whenever a run is made. A step that a resumed run makes again has another line; with step 1 the file is begun
anew."""


class StepObserver(Protocol):
    """What has work to do around every optimizer step, and a state that the next step depends on."""

    def before_step(self, step: int) -> None:
        """Called before optimizer step number `step` (from 1). What it raises gives the step up."""

    def after_step(self, step: int) -> None:
        """Called after it, while its gradients are still there. The step is applied, so this must not raise."""

    def points(self) -> Mapping[str, float]:
        """Values for the run's curves, by name, after the last applied step."""

    def state(self) -> Mapping[str, Any]:
        """A tree of plain values, as JSON has them, for the checkpoint between two steps."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`, on a resume; the parameters are those of the checkpoint already."""


class EdgeSteps(Task):
    """The steps of edge training.

    Attributes:
        spent: What the applied steps have used, over all restarts.
        loss_before, loss_after: The loss on held-out data before and after the run; None where there are none.

    Args:
        stop: The user's request to stop, which is looked at after every micro-batch.
        observers: Called around every step, in this order.
        in_flight: Where several micro-batches may be in flight; None for one at a time.
        draft: The draft that is tuned beside the model; None for none.
        listener: Hears how the run goes on; None for nobody.
        save: Writes the adapter, for the listener.
        defended: The run's defences, which are among the observers; None for none.
        before_evaluation: Called with the applied steps before held-out examples are sent.
    """

    def __init__(
        self,
        model: Any,
        data: TrainingData,
        config: TuningConfig,
        identity: ModelIdentity,
        stop: StopRequest,
        progress: StepProgress,
        meter: WireMeter | None,
        observers: Sequence[StepObserver],
        in_flight: InFlight | None,
        draft: DraftTuning | None = None,
        listener: RunListener | None = None,
        save: SaveAdapter = lambda folder: None,
        defended: DefendedRun | None = None,
        before_evaluation: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.total = total_steps(config, len(data.train))
        self.spent = Spent()
        self.loss_before: float | None = None
        self.loss_after: float | None = None
        self.add_points: AddPoints = no_curves
        beside = {} if defended is None else defended.parameters()
        # Before the rule freezes some of them.
        self.parameters: Mapping[str, nn.Parameter] = {**methods.trained(model), **beside}
        self._accuracy = None if listener is None else accuracy_for(config)
        self.rule: EdgeRule = step_rule(
            model,
            self.parameters,
            config,
            stop.check,
            in_flight,
            None if draft is None else draft.learn,
            self._accuracy,
            defended,
        )
        self.device: torch.device = model.device
        start = None if config.start_from is None else adapter_digest(config.start_from)
        self.settings: Mapping[str, Any] = {
            **fixed_settings(config, self.total, start, NO_DRAFT if draft is None else draft.settings),
            **noted_settings(config),
        }
        self._model = model
        self._data = data
        self._config = config
        self._identity = identity
        self._stop = stop
        self._progress = progress
        self._meter = meter
        self._observers = observers
        self._defended = defended
        self._draft = draft
        self._listener = listener
        self._save = save
        self._before_evaluation = before_evaluation
        self._per_epoch = steps_per_epoch(config, len(data.train))
        self._train = Batches(data.train, config.batch, data.pad_id, config.seed)
        self._held_out = Batches(data.validation, config.batch, data.pad_id)
        self._batches: list[Batch] = []
        self._started = 0.0
        self._before = WireTotals()
        self._step_spent = Spent()

    def begin(self) -> None:
        """See `Task`."""
        if self.loss_before is None:
            self.loss_before = self._evaluate(0, "before training")
        self._model.train(self.rule.goes_backward)

    def rate(self, step: int) -> float:
        """See `Task`."""
        return learning_rate(self._config, step, self.total)

    def measure(self, step: int) -> tuple[dict[str, Any], float]:
        """See `Task`."""
        self._started, self._before = time.perf_counter(), self._totals()
        if self._meter is not None:
            self._meter.begin_step(step)
        for observer in self._observers:
            observer.before_step(step)
        epoch, inside = divmod(step - 1, self._per_epoch)
        first = inside * self._config.accumulate
        drawn = None if self._defended is None else self._defended.drawn()
        if drawn is None:
            self._batches = list(self._train.epoch(epoch, first, first + self._config.accumulate))
        else:
            self._batches = list(self._train.of(drawn))
        if self._draft is not None:
            self._draft.begin_step()
        if self._accuracy is not None:
            self._accuracy.begin_step()
        loss, norm = self.rule.measure(step, self._batches)
        if self._draft is not None:
            self._draft.end_step(step)
        return {"epoch": epoch, "loss": loss}, norm

    def applied(self, step: int) -> dict[str, Any]:
        """See `Task`."""
        methods.after_step(self._model, step)
        for observer in self._observers:
            observer.after_step(step)
        fit: dict[str, Any] = {}
        if self._draft is not None:
            self._draft.apply(self.rate(step - 1) / self._config.learning_rate)
            fit = {"draft_kl": self._draft.fit.kl, "draft_agreement": self._draft.fit.agreement}
        tokens = sum(int(batch["attention_mask"].sum()) for batch in self._batches)
        positions = sum(batch["input_ids"].numel() for batch in self._batches)
        seconds = time.perf_counter() - self._started
        first = seconds if step <= self._per_epoch else 0.0
        self._step_spent = Spent(seconds, tokens, positions, self._totals() - self._before, first)
        self.spent += self._step_spent
        accuracy = {} if self._accuracy is None else {"accuracy": self._accuracy.value}
        return {"tokens": tokens, **accuracy, **fit}

    def logged(self, line: Mapping[str, Any], seconds: float) -> str:
        """See `Task`."""
        self._write_cost(line["step"])
        crossed, speed = self._step_spent.wire, self._step_spent.tokens / self._step_spent.seconds
        points = {"loss/train": line["loss"], "learning_rate": line["learning_rate"], "tokens_per_s": speed}
        points |= {"bytes/up": crossed.bytes_up, "bytes/down": crossed.bytes_down}
        for observer in self._observers:
            points |= observer.points()
        text = figures(line["loss"], speed, self.spent.wire)
        if self._draft is not None:
            points |= {"draft/kl": line["draft_kl"], "draft/agreement": line["draft_agreement"]}
            text += f"  draft KL divergence {line['draft_kl']:.4f}, top-1 agreement {line['draft_agreement']:.0%}"
        self.add_points(line["step"], points)
        if self._listener is not None:
            self._listener.stepped(line, seconds)
        return text

    def between(self, step: int) -> None:
        """See `Task`."""
        if self._config.eval_every and step % self._config.eval_every == 0 and step < self.total:
            self._evaluate(step, f"after step {step}")
        if self._listener is not None and step % self._config.save_every == 0 and step < self.total:
            self._listener.saved(step, self._save)

    def end(self) -> None:
        """See `Task`."""
        self.loss_after = self._evaluate(self.total, "after training")
        if self._listener is not None:
            self._listener.saved(self.total, self._save)

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """See `Task`: what the PEFT method remembers besides parameters (AdaLoRA), often nothing; and the draft."""
        draft = {} if self._draft is None else self._draft.tensors()
        return {"method": methods.method_state(self._model)[0], **draft}

    def entries(self) -> Mapping[str, Any]:
        """See `Task`."""
        return {
            **identity_entries(self._identity, self._data.fingerprint),
            "loss_before": self.loss_before,
            "spent": self.spent.to_json(),
            "method_state": methods.method_state(self._model)[1],
            "observers": [dict(observer.state()) for observer in self._observers],
        }

    def check(self, checkpoint: RunCheckpoint, folder: Path) -> None:
        """See `Task`."""
        check_fits(checkpoint, folder, self._identity, self._data.fingerprint)

    def load(self, checkpoint: RunCheckpoint, folder: Path) -> None:
        """See `Task`."""
        entries = checkpoint.entries
        try:
            observed, method = list(entries["observers"]), dict(entries["method_state"])
            tensors, spent = dict(checkpoint.tensors["method"]), Spent.from_json(entries["spent"])
            loss_before = entries["loss_before"]
        except (KeyError, TypeError, ValueError) as error:
            raise damaged_entry(folder, error) from error
        if len(observed) != len(self._observers):
            raise CheckpointError(
                f"{folder} cannot be resumed: it has states of {len(observed)} parts that act around each step, such "
                f"as a leak budget, and this run has {len(self._observers)}. Resume with the options that it was "
                "started with."
            )
        methods.load_method_state(self._model, tensors, method)
        for observer, state in zip(self._observers, observed, strict=True):
            observer.load_state(state)
        if self._draft is not None:
            try:
                self._draft.load(checkpoint, folder)
            except KeyError as error:
                raise damaged_entry(folder, error) from error
        self.spent, self.loss_before = spent, loss_before

    def _evaluate(self, step: int, when: str) -> float | None:
        if not self._data.validation:
            return None
        self._before_evaluation(step)
        loss = evaluate(self._model, self._held_out, self._stop.check, precision=self._config.precision)
        self._progress.message(f"validation loss {when}: {loss:.4f}")
        self.add_points(step, {"loss/validation": loss})
        if self._listener is not None:
            self._listener.evaluated(step, loss)
        return loss

    def _write_cost(self, step: int) -> None:
        spent, path = self._step_spent, self._config.out / COSTS_FILE
        wire = {"bytes_up": spent.wire.bytes_up, "bytes_down": spent.wire.bytes_down}
        line = {"step": step, "seconds": spent.seconds, "tokens": spent.tokens, **wire}
        with disk_errors(path), path.open("w" if step == 1 else "a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")

    def _totals(self) -> WireTotals:
        return WireTotals() if self._meter is None else self._meter.totals()


def figures(loss: float, tokens_per_s: float, crossed: WireTotals) -> str:
    """A step in the progress: `crossed` is what crossed so far, and is not shown where nothing does."""
    text = f"loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s"
    if crossed != WireTotals():
        text += f"  up {size(crossed.bytes_up)}  down {size(crossed.bytes_down)}"
    return text
