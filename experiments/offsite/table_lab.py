"""One training run of the table of emulators, whatever is trained: built, trained by the edge's trainer, and scored."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from rich.console import Console
from torch import nn

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.skeleton import linear_names
from isthmus.backbone.split.edge_model import SpanFn
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.backbone.split.span import FrozenSpan, load_span
from isthmus.common.errors import NonFiniteError
from isthmus.common.progress import StepProgress
from isthmus.edge.config.data_config import Precision
from isthmus.edge.config.training_config import TuningConfig
from isthmus.edge.data.batches import Batches, TrainingData, fingerprint
from isthmus.edge.run_files.run_identity import ModelIdentity
from isthmus.edge.span_cache.cache_check import cacheable_edge
from isthmus.edge.span_cache.kept_outputs import KeptOutputs, MemoryRows
from isthmus.edge.training.evaluation import evaluate
from isthmus.edge.training.methods import build_peft
from isthmus.edge.training.trainer import Trainer
from isthmus.emulator.package.manifest import Tuning
from isthmus.experiments.harness.single_process import whole
from isthmus.experiments.scoring.scores import Score
from isthmus.experiments.scoring.task_scoring import score_task
from isthmus.experiments.scoring.tasks import Task
from isthmus.protocol.limits import GIB

_KEPT_BYTES = 4 * GIB
"""Of the main memory at most, for what comes out of one middle in one precision."""


@dataclass(frozen=True, slots=True)
class Regime:
    """How everything in a table is trained and scored.

    Attributes:
        score_batch: Documents of a forward in scoring.
        warmup: Steps over which the rate rises; None for a tenth of them.
    """

    steps: int
    batch: int
    max_length: int
    rank: int
    precision: Precision
    score_precision: Precision
    alpha: float = 16.0
    score_batch: int = 16
    warmup: int | None = None


class Everything(nn.Module):
    """An edge's model with the middle that it runs over, all of it trainable: the thief's, or the whole model.

    Args:
        edge: From `load_edge_parts` over `middle`.
    """

    def __init__(self, edge: Any, middle: nn.Module) -> None:
        super().__init__()
        self.edge = edge
        self.middle = middle
        self.requires_grad_(True)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        device: torch.device = self.edge.device
        return device

    def forward(self, **inputs: Any) -> Any:
        """The edge's model's."""
        return self.edge(**inputs)

    def save_pretrained(self, folder: str) -> None:
        """Write the edge's part, the only one that has a form of its own."""
        self.edge.save_pretrained(folder)


class Lab:
    """Builds, trains and scores."""

    def __init__(self, checkpoint: Checkpoint, plan: SplitPlan, tokenizer: Any, regime: Regime, device: str) -> None:
        self._kept: WeakKeyDictionary[Any, dict[Precision, MemoryRows]] = WeakKeyDictionary()
        self.checkpoint, self.plan, self.regime = checkpoint, plan, regime
        self.middle = self._fresh_middle(device)
        self._tokenizer, self._device = tokenizer, device
        self._identity = ModelIdentity(checkpoint.name, checkpoint.digest(), str(plan))

    def at(self, regime: Regime) -> Lab:
        """The same laboratory in another regime."""
        other = copy.copy(self)
        other.regime = regime
        return other

    def edge(self, span: SpanFn) -> Any:
        """A fresh edge's model over `span`."""
        return load_edge_parts(self.checkpoint, self.plan, span).to(self._device)

    # What is trained --------------------------------------------------------------------------------------------------

    def advised(self, tuning: Tuning, span: SpanFn) -> Callable[[TuningConfig], Any]:
        """Adapters on all linears of the edge's layers that are advised: those above `span`, or all."""
        above = range(self.plan.cloud.stop, self.plan.n_layers)
        layers = self.plan.edge_layers if tuning.layers == "all" else above
        return lambda config: build_peft(self.edge(span), _on_all_linears(config, self.middle), layers=layers)

    def split(self, plan: SplitPlan, *, all_linears: bool) -> Callable[[TuningConfig], Any]:
        """Adapters on the edge's layers of another plan over the true middle, as split training has them."""

        def build(config: TuningConfig) -> Any:
            wanted = _on_all_linears(config, self.middle) if all_linears else config
            return build_peft(whole(self.checkpoint).to(self._device), wanted, layers=plan.edge_layers)

        return build

    def everything(self, middle: Callable[[], nn.Module]) -> Callable[[TuningConfig], Any]:
        """All weights of the edge's model and of a fresh middle."""

        def build(_config: TuningConfig) -> Everything:
            fresh = middle()
            return Everything(self.edge(fresh), fresh)

        return build

    # Runs -------------------------------------------------------------------------------------------------------------

    def run(
        self,
        task: Task,
        seed: int,
        rates: Sequence[float],
        build: Callable[[TuningConfig], Any],
        views: Mapping[str, SpanFn | None],
    ) -> dict[str, Any]:
        """Train at each of the rates, keep what has the least validation loss, and score it.

        Returns:
            `rate`, `validation_loss`, `tried` (rate -> validation loss; null where training ran away) and `scores`
            (view -> metric -> score).

        Raises:
            NonFiniteError: Training ran away at every rate.
            KeyboardInterrupt: Ctrl-C or SIGTERM.
        """
        best: tuple[float, float, Any] | None = None
        tried: dict[str, float | None] = {}
        for rate in rates:
            model = self._train(task, seed, rate, build)
            loss = math.inf if model is None else self._validation_loss(model, task)
            tried[f"{rate:g}"] = loss if math.isfinite(loss) else None
            if math.isfinite(loss) and (best is None or loss < best[0]):
                best = (loss, rate, model)
        if best is None:
            raise NonFiniteError(
                f"training on {task.name} ran away at each of the learning rates {', '.join(tried)}: give lower ones."
            )
        loss, rate, model = best
        scores = {name: self.score(over(model, span), task) for name, span in views.items()}
        return {"rate": rate, "validation_loss": loss, "tried": tried, "scores": scores}

    def score(self, model: Any, task: Task) -> dict[str, Any]:
        """Metric -> score, as JSON can say it."""
        regime = self.regime
        with self._keeping(model, regime.score_precision):
            scores = score_task(
                model, self._tokenizer, task, batch=regime.score_batch, precision=regime.score_precision
            )
        return {metric: score.to_json() for metric, score in scores.items()}

    def _train(self, task: Task, seed: int, rate: float, build: Callable[[TuningConfig], Any]) -> Any | None:
        """A trained model; None where training ran away."""
        data = TrainingData(task.train, (), task.pad_id, 0, fingerprint(task.train))
        with tempfile.TemporaryDirectory(prefix="isthmus-run-") as folder:
            config = self.config(seed, rate, Path(folder))
            model = build(config)
            progress = StepProgress("step", self.regime.steps, Console(quiet=True))
            try:
                with self._keeping(model, config.precision):
                    Trainer(model, data, config, self._identity, progress=progress).fit()
            except NonFiniteError:
                return None
        return model

    def config(self, seed: int, rate: float, out: Path) -> TuningConfig:
        """Of a run in this regime."""
        regime = self.regime
        return TuningConfig(
            data="-",
            validation_split=0.0,
            steps=regime.steps,
            batch=regime.batch,
            max_length=regime.max_length,
            learning_rate=rate,
            warmup_steps=regime.steps // 10 if regime.warmup is None else regime.warmup,
            seed=seed,
            rank=regime.rank,
            alpha=regime.alpha,
            precision=regime.precision,
            out=out,
            save_every=regime.steps,
            keep_checkpoints=1,
        )

    def _validation_loss(self, model: Any, task: Task) -> float:
        batches = Batches(task.validation, self.regime.score_batch, task.pad_id)
        try:
            with self._keeping(model, self.regime.score_precision):
                return evaluate(model, batches, precision=self.regime.score_precision)
        except NonFiniteError:
            return math.inf

    @contextmanager
    def _keeping(self, model: Any, precision: Precision) -> Iterator[None]:
        """Where nothing below the middle's end is trained, compute what comes out there once for each text.

        It is kept as long as the middle is there, for all runs of all seeds and rates; `_KEPT_BYTES` at most.
        """
        edge = cacheable_edge(model)
        if edge is None:
            yield
            return
        rows = self._kept.setdefault(edge.remote_layers.span, {}).setdefault(precision, MemoryRows(_KEPT_BYTES))
        with KeptOutputs(edge, rows).in_place():
            yield

    def _fresh_middle(self, device: str) -> FrozenSpan:
        return load_span(self.checkpoint, self.plan).to(device)


def over(model: Any, span: SpanFn | None) -> Any:
    """A trained model as it is scored: over `span` in the place of its middle, or as it is for None."""
    scored = model.edge if isinstance(model, Everything) else model
    if span is not None:
        base = scored.get_base_model() if hasattr(scored, "get_base_model") else scored
        base.remote_layers.span = span
    return scored


def _on_all_linears(config: TuningConfig, layers: nn.Module) -> TuningConfig:
    return config.model_copy(update={"target_modules": linear_names(layers)})


def scores_of(result: Mapping[str, Any], view: str) -> dict[str, Score]:
    """The scores of a run's result, by metric."""
    return {metric: Score.from_json(score) for metric, score in result["scores"][view].items()}
