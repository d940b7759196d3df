"""One training run of a table, whatever is trained: built, trained by the edge's trainer, and scored.

Every run of a kind on a task is trained at each candidate rate on the first seed; the rate with the least loss on the
validation slice is kept for the other seeds. For a run over an emulator, that loss is over the emulator: the data owner
has nothing else.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from rich.console import Console
from torch import nn

from isthmus.backbone.checkpoints.sources import Checkpoint, load_tokenizer, resolve
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.skeleton import linear_names
from isthmus.backbone.split.edge_model import SpanFn
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.backbone.split.span import FrozenSpan, load_span
from isthmus.common.errors import NonFiniteError
from isthmus.common.progress import StepProgress
from isthmus.common.torch_threads import use_threads
from isthmus.edge.config.data_config import Precision
from isthmus.edge.config.training_config import TuningConfig
from isthmus.edge.data.batches import Batches, TrainingData, fingerprint
from isthmus.edge.run_files.run_identity import ModelIdentity
from isthmus.edge.span_cache.cache_check import cacheable_edge
from isthmus.edge.span_cache.kept_outputs import KeptOutputs, MemoryRows
from isthmus.edge.training.evaluation import evaluate
from isthmus.edge.training.methods import build_peft
from isthmus.edge.training.trainer import Trainer
from isthmus.emulator.package.build import pick_device
from isthmus.experiments.harness.bench_flags import names_of, numbers_of, precision_of
from isthmus.experiments.harness.emulator_settings import TableSettings
from isthmus.experiments.harness.finished_cells import Cells
from isthmus.experiments.harness.single_process import whole
from isthmus.experiments.scoring.likelihood import require_lm_eval
from isthmus.experiments.scoring.scores import Score
from isthmus.experiments.scoring.task_scoring import score_task
from isthmus.experiments.scoring.tasks import Sizes, Task, default_data_folder, load_task
from isthmus.protocol.limits import GIB

_KEPT_BYTES = 4 * GIB
"""Of the main memory at most, for what comes out of one middle in one precision."""


@dataclass(frozen=True, slots=True)
class Regime:
    """How everything in a table is trained and scored.

    Attributes:
        trainables: What is trained on the edge's layers, as `--method` of `edge train`.
        weight_rates: Candidate rates where weights of the edge's layers are trained.
        adapter_rates: Candidate rates where adapters are.
        whole_rates: Candidate rates where all weights of a model are.
        score_batch: Documents of a forward in scoring.
        warmup: Steps over which the rate rises; None for a tenth of them.
    """

    trainables: str
    steps: int
    batch: int
    max_length: int
    rank: int
    weight_rates: tuple[float, ...]
    adapter_rates: tuple[float, ...]
    whole_rates: tuple[float, ...]
    precision: Precision
    score_precision: Precision
    alpha: float = 16.0
    score_batch: int = 16
    warmup: int | None = None

    def rates(self, method: str, *, everything: bool = False) -> tuple[float, ...]:
        """The candidates for a method of `edge train`, or for a run that trains all weights."""
        if everything:
            return self.whole_rates
        return self.weight_rates if method == "full" else self.adapter_rates


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

    def on_edge_layers(self, span: SpanFn) -> Callable[[TuningConfig], Any]:
        """The table's trainables on the edge's layers, over `span`."""
        return lambda config: build_peft(self.edge(span), config, total_steps=config.steps)

    def above(self, span: SpanFn) -> Callable[[TuningConfig], Any]:
        """Adapters on all linears of the layers above `span`."""
        layers = range(self.plan.cloud.stop, self.plan.n_layers)
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

    def whole_weights(self) -> Callable[[TuningConfig], Any]:
        """All weights of the whole model."""
        return self.everything(lambda: self._fresh_middle(self._device))

    def whole_adapters(self) -> Callable[[TuningConfig], Any]:
        """Adapters in all layers of the whole model."""
        return lambda config: build_peft(whole(self.checkpoint).to(self._device), config, total_steps=config.steps)

    # Runs -------------------------------------------------------------------------------------------------------------

    def run(
        self,
        task: Task,
        seed: int,
        rates: Sequence[float],
        build: Callable[[TuningConfig], Any],
        views: Mapping[str, SpanFn | None],
        *,
        method: str = "full",
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
            model = self._train(task, seed, rate, build, method)
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

    def _train(
        self, task: Task, seed: int, rate: float, build: Callable[[TuningConfig], Any], method: str
    ) -> Any | None:
        """A trained model; None where training ran away."""
        regime = self.regime
        data = TrainingData(task.train, (), task.pad_id, 0, fingerprint(task.train))
        with tempfile.TemporaryDirectory(prefix="isthmus-run-") as folder:
            config = TuningConfig(
                data="-",
                validation_split=0.0,
                steps=regime.steps,
                batch=regime.batch,
                max_length=regime.max_length,
                learning_rate=rate,
                warmup_steps=regime.steps // 10 if regime.warmup is None else regime.warmup,
                seed=seed,
                method=method,
                rank=regime.rank,
                alpha=regime.alpha,
                precision=regime.precision,
                out=Path(folder),
                save_every=regime.steps,
                keep_checkpoints=1,
            )
            model = build(config)
            progress = StepProgress("step", regime.steps, Console(quiet=True), every=regime.steps)
            try:
                with self._keeping(model, regime.precision):
                    Trainer(model, data, config, self._identity, progress=progress).fit()
            except NonFiniteError:
                return None
        return model

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


class TableWork:
    """What a table works with: its tasks, a laboratory, and the cells that are finished.

    Args:
        plan: What is cut where, for a model of so many layers, unless `--adapter-layers` says it.
        sizes: Of the tasks.
        regime: Of the laboratory.

    Raises:
        ConfigError: A task or an option does not make sense, or the package lm-eval is needed and missing.
        DataError: Data are missing or malformed.
    """

    def __init__(
        self,
        settings: TableSettings,
        console: Console,
        *,
        plan: Callable[[int], str],
        sizes: Sizes,
        regime: Regime,
    ) -> None:
        self.settings, self.console = settings, console
        self.device = pick_device(settings.device)
        use_threads(settings.threads)
        checkpoint = resolve(settings.model)
        n_layers = checkpoint.config.num_hidden_layers
        self.tokenizer = load_tokenizer(checkpoint.folder)
        self.data_folder = settings.data_folder or default_data_folder()
        names = names_of(settings.tasks, "tasks")
        self.tasks = [load_task(name, self.data_folder, self.tokenizer, sizes) for name in names]
        if any(task.questions for task in self.tasks):
            require_lm_eval()
        cut = SplitPlan.parse(settings.adapter_layers or plan(n_layers), n_layers)
        self.lab = Lab(checkpoint, cut, self.tokenizer, regime, self.device)
        self.cells = Cells(settings.out / "cells.jsonl", console)
        self._common = {
            "model": checkpoint.digest(),
            "plan": str(cut),
            "score_precision": regime.score_precision,
        }

    def scored(self, name: str, task: Task, view: str, span: SpanFn, **of: Any) -> dict[str, Any]:
        """A cell of the model over `span` as it is, with nothing trained; `of` says what `span` is."""
        score = lambda: {"scores": {view: self.lab.score(self.lab.edge(span), task)}}  # noqa: E731
        return self.cells.get(name, self._common | {"task": task.fingerprint} | of, score)

    def over_seeds(
        self,
        lab: Lab,
        task: Task,
        name: str,
        build: Callable[[TuningConfig], Any],
        *,
        rates: Sequence[float],
        seeds: Sequence[int],
        views: Mapping[str, SpanFn | None],
        of: Mapping[str, Any],
        method: str,
        trained_on: Task | None = None,
    ) -> list[dict[str, Any]]:
        """A run for each seed: the first one chooses among the rates, the others take its choice.

        Args:
            of: What the runs depend on beside the task, the rates and the regime.
            method: Of `Lab.run`.
            trained_on: In the task's place.
        """
        regime = lab.regime
        settings = self._common | {
            "task": task.fingerprint,
            "rates": list(rates),
            **{key: getattr(regime, key) for key in ("steps", "batch", "rank", "alpha", "precision")},
            **of,
        }
        results: list[dict[str, Any]] = []
        for seed in seeds:
            own = rates if not results else (results[0]["rate"],)
            run = partial(lab.run, trained_on or task, seed, own, build, views, method=method)
            results.append(self.cells.get(f"{task.name} {name} seed {seed}", settings | {"seed": seed}, run))
        return results


def regime_of(settings: TableSettings, *, batch: int, steps: int, rank: int) -> Regime:
    """How a table's settings train and score; `batch` where they do not say it."""
    return Regime(
        trainables="lora" if settings.preset else settings.trainables,
        steps=steps,
        batch=settings.batch or batch,
        max_length=settings.max_length,
        rank=rank,
        weight_rates=numbers_of(settings.learning_rates, "learning-rates"),
        adapter_rates=numbers_of(settings.adapter_rates, "adapter-rates"),
        whole_rates=numbers_of(settings.whole_rates, "whole-rates"),
        precision=precision_of(settings.precision, "precision"),
        score_precision=precision_of(settings.score_precision, "score-precision"),
    )
