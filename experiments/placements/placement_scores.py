"""How well each mode learns: runs of `isthmus edge train` against a real cloud, scored on held-out data.

Every mode is trained at each candidate rate on the first seed; the rate with the least loss on a validation slice is
kept for the other seeds. Scores are of the saved adapter on the whole model, or on another that the caller has, on the
test data. Each run is a cell on the disk: an interrupted benchmark goes on, and several processes may share the work.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from isthmus.backbone.adapters.adapter_files import load_adapter
from isthmus.backbone.checkpoints.sources import Checkpoint, load_tokenizer
from isthmus.common.files import write_atomic
from isthmus.edge.config.data_config import Precision
from isthmus.edge.sites.live_sites import DECISIONS
from isthmus.experiments.harness.bench_flags import precision_of
from isthmus.experiments.harness.bench_settings import CodecSettings, QuantizeSettings
from isthmus.experiments.harness.finished_cells import Cells
from isthmus.experiments.harness.launch import LocalCloud
from isthmus.experiments.harness.processes import run_isthmus, train_flags
from isthmus.experiments.harness.single_process import train_whole, whole
from isthmus.experiments.placements.placement_costs import site_shares
from isthmus.experiments.placements.placement_modes import SINGLE, Mode
from isthmus.experiments.scoring.task_scoring import score_task
from isthmus.experiments.scoring.tasks import Question, Sizes, Task, default_data_folder, load_task, read_task

SCORE_BATCH = 16  # documents of a forward in scoring


@dataclass(frozen=True, slots=True)
class Regime:
    """How every run is trained and scored.

    Attributes:
        rates: Candidate learning rates, the same for all modes.
        seeds: Of the modes whose sites a policy chooses, and of always-on or, without it, of the single process; the
            others have the first one.
    """

    task: str
    data_folder: Path
    sizes: Sizes
    steps: int
    batch: int
    rates: tuple[float, ...]
    seeds: int
    precision: Precision
    cloud_dtype: str
    threads: int
    shared: dict[str, Any] = field(default_factory=dict)


def one_rate_regime(settings: CodecSettings | QuantizeSettings, cloud_dtype: str) -> Regime:
    """The regime of a benchmark that trains each candidate once, at one rate.

    Raises ConfigError where the precision is neither fp32 nor bf16.
    """
    return Regime(
        task=settings.task,
        data_folder=settings.data_folder or default_data_folder(),
        sizes=Sizes(test=settings.test, validation=16, max_length=settings.max_length),
        steps=settings.steps,
        batch=settings.batch,
        rates=(settings.learning_rate,),
        seeds=1,
        precision=precision_of(settings.precision, "precision"),
        cloud_dtype=precision_of(cloud_dtype, "cloud-dtype"),
        threads=settings.threads,
    )


def described(regime: Regime) -> dict[str, Any]:
    """The regime, for the settings of a result: without the place where the data lie."""
    return {name: value for name, value in asdict(regime).items() if name != "data_folder"}


class Scorer:
    """Trains and scores.

    Args:
        model: What is scored with the adapter in it; by default the whole model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        edge_layers: str,
        regime: Regime,
        cells: Cells,
        folder: Path,
        cloud: Callable[[str], LocalCloud],
        model: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._edge_layers = edge_layers
        self._regime = regime
        self._cells = cells
        self._folder = folder
        self._cloud = cloud
        self._model = model or (lambda: nullcontext(whole(checkpoint)))
        self._tokenizer = load_tokenizer(checkpoint.folder)
        self.task: Task = load_task(regime.task, regime.data_folder, self._tokenizer, regime.sizes)
        self._digest = checkpoint.digest()

    def zero_shot(self, name: str = "zero-shot") -> dict[str, float]:
        """The model's scores as it is, by metric."""
        return self._cells.get(name, self.settings, lambda: self._score(None))

    def best_rate(self, mode: Mode) -> float:
        """The rate with the least validation loss on the first seed."""
        rates = self._regime.rates
        return min(rates, key=lambda rate: self.run(mode, rate, 0)["validation"]) if len(rates) > 1 else rates[0]

    def run(self, mode: Mode, rate: float, seed: int) -> dict[str, Any]:
        """One run.

        Returns:
            `validation` (a loss), `scores` (by metric), `report` (of `edge train`), and where a policy chooses
            `shares` and `decisions`.
        """
        name = f"{mode.name} rate {rate:g} seed {seed}"
        settings = self.settings | {
            "plan": mode.edge_layers(self._edge_layers),
            "options": dict(mode.options),
            "rate": rate,
            "seed": seed,
        }
        return self._cells.get(name, settings, lambda: self._train(mode, rate, seed, name.replace(" ", "-")))

    @property
    def settings(self) -> dict[str, Any]:
        """What every score depends on."""
        regime = asdict(self._regime)
        for name in ("data_folder", "rates", "seeds", "sizes"):
            del regime[name]
        return {"model": self._digest, "data": self.task.fingerprint, **regime}

    def _train(self, mode: Mode, rate: float, seed: int, name: str) -> dict[str, Any]:
        regime, out = self._regime, self._folder / "runs" / name
        shutil.rmtree(out, ignore_errors=True)
        train, validation = self._files()
        options: dict[str, Any] = {
            "data": str(train),
            "validation": str(validation),
            "out": str(out),
            "steps": regime.steps,
            "batch": regime.batch,
            "max_length": regime.sizes.max_length,
            "learning_rate": rate,
            "seed": seed,
            "precision": regime.precision,
            "save_every": regime.steps,
            "log_every": 50,
            "threads": regime.threads,
            **regime.shared,
        }
        if mode.name == SINGLE:
            train_whole(str(self._checkpoint.folder), self._edge_layers, options | mode.alone, everywhere=True)
        else:
            cloud = self._cloud(mode.edge_layers(self._edge_layers))
            options |= {"cloud": str(cloud.connection), "key": str(cloud.edge_key), **mode.options}
            run_isthmus("edge", "train", *train_flags(options))
        report = json.loads((out / "report.json").read_text())
        result = {"validation": report["loss_after"], "scores": self._score(out / "adapter"), "report": report}
        if mode.chooses:
            result["shares"] = site_shares(out)
            decisions = map(json.loads, (out / DECISIONS).read_text().splitlines())
            kept = ("step", "killed", "revived", "live")  # without the scores, which are long
            result["decisions"] = [{name: decision[name] for name in kept} for decision in decisions]
        shutil.rmtree(out)
        return result

    def _files(self) -> tuple[Path, Path]:
        """The training and the validation examples as files that `edge train` reads."""
        split = read_task(self._regime.task, self._regime.data_folder, self._regime.sizes)
        paths = []
        for name, questions in (("train", split.train), ("validation", split.validation)):
            path = self._folder / f"{self._regime.task}-{name}.jsonl"
            write_atomic(path, "".join(map(_line, questions)).encode())
            paths.append(path)
        return paths[0], paths[1]

    def _score(self, adapter: Path | None) -> dict[str, float]:
        with self._model() as model:
            adapted = model if adapter is None else load_adapter(model, adapter, digest=self._digest)
            precision = self._regime.precision
            scores = score_task(adapted, self._tokenizer, self.task, batch=SCORE_BATCH, precision=precision)
        return {metric: score.value for metric, score in scores.items()}


def _line(question: Question) -> str:
    example = question.example
    return json.dumps({"prompt": example.prompt, "completion": example.completion}) + "\n"
