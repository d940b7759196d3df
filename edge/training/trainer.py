"""The data owner's training run: the loop over `EdgeSteps`, and the adapter and the report that it ends with."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from isthmus.backbone.adapters.adapter_files import save_adapter
from isthmus.common.errors import ConfigError
from isthmus.common.files import claim, write_atomic
from isthmus.common.progress import StepProgress
from isthmus.common.shutdown import Interrupted, StopRequest
from isthmus.common.torch_threads import use_threads
from isthmus.edge.config.schedule import steps_per_epoch, total_steps
from isthmus.edge.config.training_config import TuningConfig
from isthmus.edge.data.batches import TrainingData
from isthmus.edge.drafts.tuned_draft import TUNED_DRAFT
from isthmus.edge.run_files.run_identity import START_ANEW, ModelIdentity
from isthmus.edge.run_files.tensorboard_curves import open_curves
from isthmus.edge.run_report import (
    Report,
    WireMeter,
    count,
    draft_fit,
    flops,
    linear_parameters,
    peak_bytes,
    shares,
    step_seconds,
    traffic,
)
from isthmus.edge.training import methods
from isthmus.edge.training.defended_run import DefendedRun
from isthmus.edge.training.draft_tuning import DraftTuning
from isthmus.edge.training.edge_steps import EdgeSteps, StepObserver
from isthmus.edge.training.micro_batches import InFlight
from isthmus.edge.training.run_listener import RunListener
from isthmus.training.run_checkpoint import latest
from isthmus.training.training_loop import LoopOptions, TrainingLoop

LOG_FILE = "losses.jsonl"


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What `Trainer.fit` made: the report and the folder of the adapter."""

    report: Report
    adapter: Path


class Evidence(Protocol):
    """What a run keeps, so that what it was computed with can be shown later."""

    def begin(self) -> None:
        """Called before the first step that this process makes; the run's folder is this process's."""

    def finish(self, adapter: Path, leak: str | None = None) -> None:
        """Called when the adapter is in its folder.

        Args:
            leak: What was measured of what the cloud can learn, in a line.
        """


class LeakWatch(StepObserver, Protocol):
    """What attacks a run on the edge, and ends it where a budget is broken."""

    @property
    def line(self) -> str | None:
        """What was measured, in a line; None for nothing yet."""

    def begin(self, check_stop: Callable[[], None]) -> None:
        """Called before this process sends anything private, with the parameters that it begins with.

        Args:
            check_stop: Raises once Ctrl-C or SIGTERM has come.

        Raises:
            LeakBudgetError: The budget is broken.
        """

    def before_evaluation(self, step: int) -> None:
        """Called after `step` applied steps, before held-out examples are sent.

        Raises:
            LeakBudgetError: The budget is broken.
        """

    def figures(self) -> dict[str, Any]:
        """What the report says, under the names that `Report` has for it."""


class Trainer:
    """Trains what `methods.build_peft` made trainable.

    Args:
        model: A transformers `PreTrainedModel` or a `PeftModel` with something trainable.
        codec: How it carries tensors, for the report; "none" where nothing crosses.
        span_parameters: Weights of linear layers in the cloud's span, for the FLOPs of the report.
        emulator_parameters: The same of an emulator that stands for the span here, each time that one is used.
        cloud_peak: Asked at the end for the cloud's peak memory in bytes.
        step_observers: Called around every step, in this order; their states are in the checkpoints.
        in_flight: Where several micro-batches may be in flight; None for one at a time.
        draft: The draft that is tuned beside the model; None for none.
        listener: Hears how the run goes on; None for nobody.
        defended: The run's defences; None for none.
        evidence: What is kept of what crosses; None for nothing.
        leak: Attacks the run for its leak budget; None for nobody.
        within: Entered once the run's folder is this process's and is known to hold no other run; left at the end.
    """

    def __init__(
        self,
        model: Any,
        data: TrainingData,
        config: TuningConfig,
        identity: ModelIdentity,
        *,
        meter: WireMeter | None = None,
        codec: str = "none",
        span_parameters: int = 0,
        emulator_parameters: int = 0,
        cloud_peak: Callable[[], int | None] = lambda: None,
        progress: StepProgress | None = None,
        step_observers: Sequence[StepObserver] = (),
        in_flight: InFlight | None = None,
        draft: DraftTuning | None = None,
        listener: RunListener | None = None,
        defended: DefendedRun | None = None,
        evidence: Evidence | None = None,
        leak: LeakWatch | None = None,
        within: AbstractContextManager[object] | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self._data = data
        self._identity = identity
        self._codec = codec
        self._span_parameters = span_parameters
        self._emulator_parameters = emulator_parameters
        self._cloud_peak = cloud_peak
        self._draft = draft
        self._meter = meter
        self._listener = listener
        self._defended = defended
        self._evidence = evidence
        self._leak = leak
        self._within = within or nullcontext()
        self._stop = StopRequest()
        total = total_steps(config, len(data.train))
        self._progress = progress or StepProgress("step", total, every=config.log_every)
        self._steps = EdgeSteps(
            model,
            data,
            config,
            identity,
            self._stop,
            self._progress,
            meter,
            [*step_observers, *(observer for observer in (leak, defended) if observer is not None)],
            in_flight,
            draft,
            listener,
            self._save_adapter,
            defended,
            (lambda step: None) if leak is None else leak.before_evaluation,
        )
        self._n_trained = count(methods.trained(model).values())  # the rule has frozen what it does not move
        options = LoopOptions(
            folder=config.out,
            log_name=LOG_FILE,
            total=total,
            save_every=config.save_every,
            keep=config.keep_checkpoints,
            go_on="repeat the command with --resume to go on" if listener is None else listener.go_on,
            start_anew=START_ANEW,
        )
        self._loop = TrainingLoop(self._steps, options, self._progress, self._stop)

    @property
    def step(self) -> int:
        """Applied steps."""
        return self._loop.step

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
            LeakBudgetError: Attacks recover more than the leak budget allows.
            ConfigError: `out` holds another run and `resume` is not set, or another process trains into it.
            IsthmusError: Whatever the wire raises. Before it rises, the last applied step is saved.
        """
        use_threads(self.config.threads)
        random.seed(self.config.seed)
        torch.manual_seed(self.config.seed)
        with claim(self.config.out), ExitStack() as stack:
            with self._loop.listening():
                self._resume()
                stack.enter_context(self._within)
                if self._data.dropped:
                    cut = (
                        f"cut to {self.config.max_length} tokens, they have no label; a larger --max-length keeps them"
                    )
                    self._progress.message(f"{self._data.dropped} examples are left out: {cut}")
                if self._evidence is not None:
                    self._evidence.begin()
                if self._leak is not None:
                    self._attack(self._leak)
                if self._listener is not None:
                    self._listener.began(self.step, self._steps.total, self._save_adapter, self._meter)
                with open_curves(self.config, self.step) as self._steps.add_points:
                    self._loop.run()
            return self._finish()

    def check_stop(self) -> None:
        """For whatever waits while a step is made: raises `Interrupted` once Ctrl-C or SIGTERM has come."""
        self._stop.check()

    def _resume(self) -> None:
        out = self.config.out
        if not self.config.resume and (folder := latest(out)) is not None:
            raise ConfigError(f"{out} holds a run ({folder.name}): add --resume to go on, or {START_ANEW}.")
        if not self._loop.resume() and self.config.resume:
            self._progress.message(f"No checkpoint in {out} yet: starting from the beginning.")

    def _attack(self, leak: LeakWatch) -> None:
        try:
            leak.begin(self.check_stop)
        except Interrupted:
            raise KeyboardInterrupt("Stopped before this process sent anything private.") from None

    def _finish(self) -> TrainResult:
        adapter = self.config.out / "adapter"
        self._save_adapter(adapter)
        report = self._report()
        if self._draft is not None:
            self._draft.save(self.config.out / TUNED_DRAFT)
        write_atomic(self.config.out / "report.json", f"{report.to_json()}\n".encode())
        if self._evidence is not None:
            self._evidence.finish(adapter, None if self._leak is None else self._leak.line)
        return TrainResult(report, adapter)

    def _save_adapter(self, folder: Path) -> None:
        save_adapter(self.model, folder, record=self._record())

    def _record(self) -> dict[str, Any]:
        """What the adapter's folder says about where it was made; whoever plugs it in checks that. Where it stays
        on the edge, also which form the examples had; where it leaves, what is guaranteed of it."""
        made_on = {"digest": self._identity.digest, "plan": self._identity.plan, "method": self.config.method}
        package = self._identity.package
        if package is None:
            return made_on | {"form": self._data.form}
        promised = {} if self._defended is None else self._defended.figures()
        return made_on | {"package": package} | promised

    def _report(self) -> Report:
        spent, lines = self._steps.spent, [json.loads(line) for line in self._loop.log]
        figures: dict[str, Any] = {
            **({} if self._draft is None else draft_fit(lines)),
            **({} if self._defended is None else self._defended.figures()),
            **({} if self._leak is None else self._leak.figures()),
            **shares(spent),
            **step_seconds(spent, self.step, steps_per_epoch(self.config, len(self._data.train))),
            **traffic(spent),
            **self._flops(spent.positions),
        }
        return Report(
            loss_before=self._steps.loss_before,
            loss_after=self._steps.loss_after,
            train_loss_first=lines[0]["loss"],
            train_loss_last=lines[-1]["loss"],
            steps=self.step,
            examples=len(self._data.train),
            dropped_examples=self._data.dropped,
            tokens=spent.tokens,
            positions=spent.positions,
            seconds=spent.seconds,
            tokens_per_s=spent.tokens / spent.seconds,
            bytes_up=spent.wire.bytes_up,
            bytes_down=spent.wire.bytes_down,
            peak_bytes_edge=peak_bytes(),
            peak_bytes_cloud=self._cloud_peak(),
            calls=spent.wire.calls,
            retries=spent.wire.retries,
            trained_parameters=self._n_trained,
            model=self._identity.name,
            plan=self._identity.plan,
            method=self.config.method,
            codec=self._codec,
            **figures,
        )

    def _flops(self, positions: int) -> dict[str, int]:
        """FLOPs of both sides; what a draft computes is the edge's."""
        edge = linear_parameters(self.model) + self._emulator_parameters
        trained = self._n_trained if self._steps.rule.goes_backward else 0
        if self._draft is not None:
            edge, trained = edge + self._draft.n_linear, trained + self._draft.n_trained
        return flops(edge, trained, self._span_parameters, positions)
