"""The data owner's training loop. It knows nothing of where the model's middle layers run.

One optimizer step draws `accumulate` micro-batches (fewer at an epoch's end: a step never spans two epochs). What is
done with them is the rule's business (`isthmus.edge.training.step_rule`). A step's loss is the mean over all its
labels, whatever the micro-batches' sizes.

A step is applied whole or not at all. Whatever goes wrong in the middle of one, the parameters are still those after
the last applied step; the random state from before the step is at hand; so a checkpoint can be written then, and the
step is made again, the same, after a resume. The loss log `losses.jsonl` has one line per applied step, and starts on a
resume as the checkpoint had it.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from isthmus.backbone.adapters.adapter_files import adapter_digest, save_adapter
from isthmus.common.errors import ConfigError, DiskError, IsthmusError, NonFiniteError
from isthmus.common.files import claim, disk_errors, write_atomic
from isthmus.common.shutdown import Interrupted, StopRequest
from isthmus.common.torch_threads import use_threads
from isthmus.edge.config.schedule import learning_rate, steps_per_epoch, total_steps
from isthmus.edge.config.training_config import TuningConfig
from isthmus.edge.data.batches import Batches, TrainingData
from isthmus.edge.run_report import (
    Report,
    Spent,
    StripMeter,
    StripTotals,
    count,
    flops,
    linear_parameters,
    peak_bytes,
    shares,
    traffic,
)
from isthmus.edge.training import methods, training_checkpoint as checkpoints
from isthmus.edge.training.evaluation import evaluate
from isthmus.edge.training.micro_batches import Lanes
from isthmus.edge.training.optimizers import step_rule
from isthmus.edge.training.tensorboard_curves import AddPoints, no_curves, open_curves
from isthmus.edge.training.training_checkpoint import Checkpoint, ModelIdentity, RandomState
from isthmus.edge.training.training_progress import TrainProgress


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What `Trainer.fit` made: the report and the folder of the adapter."""

    report: Report
    adapter: Path


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


class Trainer:
    """Trains what `methods.build_peft` made trainable.

    Args:
        model: A transformers `PreTrainedModel` or a `PeftModel` with something trainable.
        data: From `load_data`.
        config: The run's options. `out` is created.
        identity: Which model this is; a checkpoint of another one is refused.
        meter: The strip, where there is one.
        codec: How it carries tensors, for the report; "none" where nothing crosses.
        span_parameters: Weights of linear layers in the cloud's span, for the FLOPs of the report.
        emulator_parameters: The same of an emulator that stands for the span here, each time that one is used.
        cloud_peak: Asked at the end for the cloud's peak memory in bytes.
        progress: Where progress is shown; standard error by default.
        step_observers: Called around every step, in this order; their states are in the checkpoints.
        lanes: Where several micro-batches may be on their way at a time; None for one after the other.
    """

    def __init__(
        self,
        model: Any,
        data: TrainingData,
        config: TuningConfig,
        identity: ModelIdentity,
        *,
        meter: StripMeter | None = None,
        codec: str = "none",
        span_parameters: int = 0,
        emulator_parameters: int = 0,
        cloud_peak: Callable[[], int | None] = lambda: None,
        progress: TrainProgress | None = None,
        step_observers: Sequence[StepObserver] = (),
        lanes: Lanes | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.total = total_steps(config, len(data.train))
        self.step = 0  # applied steps
        self._data = data
        self._identity = identity
        self._meter = meter
        self._codec = codec
        self._span_parameters = span_parameters
        self._emulator_parameters = emulator_parameters
        self._cloud_peak = cloud_peak
        self._progress = progress or TrainProgress(self.total, config.log_every)
        self._per_epoch = steps_per_epoch(config, len(data.train))
        self._train = Batches(data.train, config.batch, data.pad_id, config.seed)
        self._held_out = Batches(data.validation, config.batch, data.pad_id)
        self._start = None if config.start_from is None else adapter_digest(config.start_from)
        self._parameters = methods.trained(model)  # what checkpoints hold; the rule may freeze some of it
        self._rule = step_rule(model, self._parameters, config, self.check_stop, lanes)
        self._n_trained = count(methods.trained(model).values())
        self._observers = step_observers
        self._losses: list[str] = []
        self._loss_before: float | None = None
        self._spent = Spent()
        self._stop = StopRequest()
        self._add_points: AddPoints = no_curves
        self._mark()

    def fit(self) -> TrainResult:
        """Train to the end, or from the newest checkpoint on with `resume`.

        Returns:
            The report and the adapter's folder, both also in `out`.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM; the message says how to go on. A second signal stops at once, without
                a checkpoint.
            NonFiniteError: A loss or a gradient is NaN or infinite.
            CheckpointError: The newest checkpoint is damaged or does not belong to this run.
            DiskError: The disk is full.
            ConfigError: `out` holds another run and `resume` is not set, or another process trains into it.
            IsthmusError: Whatever the strip raises. Before it rises, the last applied step is saved.
        """
        use_threads(self.config.threads)
        random.seed(self.config.seed)
        torch.manual_seed(self.config.seed)
        with claim(self.config.out):
            with self._stop.listen(self._progress.message), self._progress:
                self._resume()
                self._mark()
                with open_curves(self.config, self.step) as self._add_points:
                    loss_after = self._guarded_run()
            return self._finish(loss_after)

    def check_stop(self) -> None:
        """For whatever waits while a step is made: raises `Interrupted` once Ctrl-C or SIGTERM has come."""
        self._stop.check()

    def _guarded_run(self) -> float | None:
        """Run to the end; whatever stops it, save the last applied step and say how to go on."""
        try:
            return self._run()
        except Interrupted:
            raise KeyboardInterrupt(
                f"Stopped after step {self.step} of {self.total}. {self._rescue()}: repeat the command with --resume."
            ) from None
        except DiskError:
            raise
        except NonFiniteError as error:
            # The same settings would lead to the same end, and other ones are another run.
            raise type(error)(f"{error} {self._rescue()}; a run with other settings needs another --out.") from error
        except IsthmusError as error:
            raise type(error)(f"{error} {self._rescue()}: repeat the command with --resume to go on.") from error

    def _run(self) -> float | None:
        if self._loss_before is None:
            self._loss_before = self._evaluate("before training")
        self.model.train(self._rule.goes_backward)
        self._progress.start(self.step)
        while self.step < self.total:
            self._apply_one_step()
            if self.step % self.config.save_every == 0 or self.step == self.total:
                self._save()
            if self.config.eval_every and self.step % self.config.eval_every == 0 and self.step < self.total:
                self._evaluate(f"after step {self.step}")
        return self._evaluate("after training")

    def _apply_one_step(self) -> None:
        step, started, before = self.step + 1, time.perf_counter(), self._totals()
        self._mark()
        if self._meter is not None:
            self._meter.begin_step(step)
        for observer in self._observers:
            observer.before_step(step)
        epoch, position = self._where()
        batches = list(self._train.epoch(epoch, position, position + self.config.accumulate))
        rate = learning_rate(self.config, self.step, self.total)
        loss, norm = self._rule.measure(step, batches)
        # The last place to give the step up: from here on it is applied whole.
        self._rule.apply(rate)
        methods.after_step(self.model, step)
        for observer in self._observers:
            observer.after_step(step)
        self.step = step
        self._mark()
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        positions = sum(batch["input_ids"].numel() for batch in batches)
        spent = Spent(time.perf_counter() - started, tokens, positions, self._totals() - before)
        self._spent += spent
        line = {"step": step, "epoch": epoch, "loss": loss, "learning_rate": rate, "grad_norm": norm, "tokens": tokens}
        self._log(line, spent)

    def _mark(self) -> None:
        """Note what the next step depends on besides parameters, in case a step that has begun is given up."""
        self._random = RandomState.take(self.model.device)
        self._observed = tuple(copy.deepcopy(observer.state()) for observer in self._observers)

    def _evaluate(self, when: str) -> float | None:
        if not self._data.validation:
            return None
        loss = evaluate(self.model, self._held_out, self._stop.check, precision=self.config.precision)
        self._progress.message(f"validation loss {when}: {loss:.4f}")
        self._add_points(self.step, {"loss/validation": loss})
        return loss

    def _log(self, line: dict[str, Any], spent: Spent) -> None:
        # Nothing here depends on time, so the log of an interrupted and resumed run equals an undisturbed one's.
        self._losses.append(json.dumps(line) + "\n")
        path = self.config.out / "losses.jsonl"
        with disk_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(self._losses[-1])
        speed = spent.tokens / spent.seconds
        self._progress.update(self.step, line["loss"], speed, self._spent.strip)
        points = {"loss/train": line["loss"], "learning_rate": line["learning_rate"], "tokens_per_s": speed}
        points |= {"bytes/up": spent.strip.bytes_up, "bytes/down": spent.strip.bytes_down}
        for observer in self._observers:
            points |= observer.points()
        self._add_points(self.step, points)

    def _where(self) -> tuple[int, int]:
        """Epoch and micro-batch that the next step begins with."""
        epoch, inside = divmod(self.step, self._per_epoch)
        return epoch, inside * self.config.accumulate

    def _totals(self) -> StripTotals:
        return StripTotals() if self._meter is None else self._meter.totals()

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def _save(self) -> Path:
        epoch, position = self._where()
        tensors, values = methods.method_state(self.model)
        state = Checkpoint(
            step=self.step,
            epoch=epoch,
            position=position,
            model=self._identity,
            data=self._data.fingerprint,
            settings=checkpoints.fixed_settings(self.config, self.total, self._start),
            parameters=dict(self._parameters),
            optimizer=self._rule.state(),
            random=self._random,
            losses=tuple(self._losses),
            learning_rate=learning_rate(self.config, self.step, self.total),
            loss_before=self._loss_before,
            spent=self._spent,
            method_tensors=tensors,
            method_state=values,
            observers=self._observed,
        )
        return checkpoints.save(self.config.out, state, self.config.keep_checkpoints)

    def _rescue(self) -> str:
        """Save the last applied step; returns where."""
        return f"The last applied step is saved in {self._save()}"

    def _resume(self) -> None:
        folder = checkpoints.latest(self.config.out)
        log = self.config.out / "losses.jsonl"
        if folder is not None and not self.config.resume:
            raise ConfigError(
                f"{self.config.out} holds a run ({folder.name}): add --resume to go on, or give another --out."
            )
        if folder is None:
            if self.config.resume:
                self._progress.message(f"No checkpoint in {self.config.out} yet: starting from the beginning.")
            write_atomic(log, b"")
            return
        state = checkpoints.load(folder)
        settings = checkpoints.fixed_settings(self.config, self.total, self._start)
        checkpoints.check_fits(state, folder, self._identity, self._data.fingerprint, settings)
        self._restore(state, folder)
        write_atomic(log, "".join(state.losses).encode())
        self._progress.message(f"Resumed after step {state.step} of {self.total} from {folder}.")

    def _restore(self, state: Checkpoint, folder: Path) -> None:
        checkpoints.check_places(state, folder, self._parameters, len(self._observers))
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state.parameters[name])
        self._rule.load_state(dict(state.optimizer))
        methods.load_method_state(self.model, dict(state.method_tensors), dict(state.method_state))
        for observer, observed in zip(self._observers, state.observers, strict=True):
            observer.load_state(observed)
        state.random.restore(self.model.device)
        self.step, self._spent, self._loss_before = state.step, state.spent, state.loss_before
        self._losses = list(state.losses)

    # The end ---------------------------------------------------------------------------------------------------------

    def _finish(self, loss_after: float | None) -> TrainResult:
        adapter = self.config.out / "adapter"
        save_adapter(self.model, adapter, record=self._record())
        report = self._report(loss_after)
        report.write(self.config.out / "report.json")
        return TrainResult(report, adapter)

    def _record(self) -> dict[str, str]:
        """What the adapter's folder says about where it was made; whoever plugs it in checks that."""
        made_on = {"digest": self._identity.digest, "plan": self._identity.plan, "method": self.config.method}
        return made_on if self._identity.package is None else made_on | {"package": self._identity.package}

    def _report(self, loss_after: float | None) -> Report:
        spent = self._spent
        figures: dict[str, Any] = {
            **shares(spent),
            **traffic(spent),
            **flops(
                linear_parameters(self.model) + self._emulator_parameters,
                self._n_trained if self._rule.goes_backward else 0,
                self._span_parameters,
                spent.positions,
            ),
        }
        return Report(
            loss_before=self._loss_before,
            loss_after=loss_after,
            train_loss_first=json.loads(self._losses[0])["loss"],
            train_loss_last=json.loads(self._losses[-1])["loss"],
            steps=self.step,
            examples=len(self._data.train),
            dropped_examples=self._data.dropped,
            tokens=spent.tokens,
            positions=spent.positions,
            seconds=spent.seconds,
            tokens_per_s=spent.tokens / spent.seconds,
            bytes_up=spent.strip.bytes_up,
            bytes_down=spent.strip.bytes_down,
            peak_bytes_edge=peak_bytes(),
            peak_bytes_cloud=self._cloud_peak(),
            calls=spent.strip.calls,
            retries=spent.strip.retries,
            trained_parameters=self._n_trained,
            model=self._identity.name,
            plan=self._identity.plan,
            method=self.config.method,
            codec=self._codec,
            **figures,
        )
