"""The table of Offsite-Tuning (Xiao et al. 2023): what a data owner gains and what a thief does, by method and task.

For each task: the full model as it is, fully fine-tuned, with LoRA in all layers, and with the edge's layers tuned over
the full middle, which is the reference that a recovery is a share of. For each method: the emulator as it is, the same
edge layers tuned over the emulator (scored there, and plugged into the full middle), and the thief, who keeps the
package and trains all of it on the same data for as many steps. The thief takes the better of that and the tuned
emulator, by the validation slice.

Each result is a cell, kept in `out`; a table that was interrupted goes on with what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from isthmus.common.errors import ConfigError
from isthmus.common.figures import plotting
from isthmus.emulator.compress.emulator_model import Emulator
from isthmus.emulator.distill.distillation import DistillConfig
from isthmus.experiments.harness.bench_flags import names_of, numbers_of
from isthmus.experiments.harness.emulator_settings import TableSettings
from isthmus.experiments.offsite.preset_table import PresetTable
from isthmus.experiments.offsite.table_lab import TableWork, regime_of, scores_of
from isthmus.experiments.offsite.table_methods import Built, Method, Workshop
from isthmus.experiments.offsite.table_rows import draw_frontier, rows_of, verdict_of
from isthmus.experiments.scoring.scores import Score
from isthmus.experiments.scoring.tasks import Sizes, Task

_SEEDS, _BATCH, _PLAN = 3, 8, "2:2"
_WHOLE = ("full_fine_tuned", "lora_full")


def run_table(settings: TableSettings, *, console: Console | None = None) -> dict[str, Any]:
    """Make the table, or go on with it, and draw the frontier if it is asked for.

    Returns:
        `runs` (see `rows_of`), `verdict`, `no_signal`, `methods` (see `verdict_of`) and `settings`; of presets `runs`
        (see `row_of`) and `settings`.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the message says how to go on.
        ConfigError: A task, a method or an option does not make sense, or the package lm-eval is needed and missing.
        DataError: Data are missing or malformed.
    """
    if settings.preset and settings.figure is not None:
        raise ConfigError("--figure draws methods, none of presets: leave it out, or give --methods without --preset")
    if settings.figure is not None:
        plotting()  # a missing package is reported before the long run, not after it
    try:
        console = console or Console(stderr=True, highlight=False)
        if settings.preset:
            return PresetTable(settings, console).make()
        result = _Run(settings, console).make()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"Stopped; what is finished is kept in {settings.out}: repeat the command to go on."
        ) from None
    if settings.figure is not None:
        draw_frontier(result["methods"], settings.figure, f"{settings.model}, {settings.tasks}")
    return result


class _Run(TableWork):
    def __init__(self, settings: TableSettings, console: Console) -> None:
        regime = regime_of(settings, batch=_BATCH, steps=settings.steps, rank=settings.rank)
        self._sizes = Sizes(test=settings.test, validation=settings.validation, max_length=settings.max_length)
        self._method_names = names_of(settings.methods, "methods")
        self._keeps = numbers_of(settings.keep, "keep")
        self._distill = DistillConfig(
            steps=settings.distill_steps,
            batch=settings.distill_batch,
            learning_rate=settings.distill_learning_rate,
            mse_weight=settings.mse_weight,
            lm_weight=settings.lm_weight,
            precision=regime.precision,
        )
        super().__init__(settings, console, plan=lambda _: _PLAN, sizes=self._sizes, regime=regime)
        self._n_seeds = settings.seeds or _SEEDS
        self._workshop = Workshop(
            folder=settings.out / "emulators",
            checkpoint=self.lab.checkpoint,
            plan=self.lab.plan,
            tokenizer=self.tokenizer,
            text=settings.text or self.data_folder / "shakespeare" / "input.txt",
            length=settings.text_length,
            options=self._distill,
            device=self.device,
        )
        # A given emulator has a share of its own, so it comes once.
        methods = [Method.parse(text, keep) for text in self._method_names for keep in self._keeps]
        self._methods = list(dict.fromkeys(methods))
        for method in self._methods:
            self._workshop.check(method)
        self.cells.expect(self._expected())

    def make(self) -> dict[str, Any]:
        """All cells, then the rows."""
        references = {task.name: self._references(task) for task in self.tasks}
        rows: list[dict[str, Any]] = []
        for method in self._methods:
            built = self._workshop.build(method, self.console)
            emulator = built.load(self._workshop.checkpoint, self.device)
            for task in self.tasks:
                rows += self._with_emulator(built, emulator, task, references[task.name])
        return {"runs": rows, **verdict_of(rows), "settings": self._described()}

    def _described(self) -> dict[str, Any]:
        """The settings as JSON can say them, without paths of this machine."""
        settings = self.settings
        return {
            **{name: getattr(settings, name) for name in ("model", "text_length", "whole_runs", "threads")},
            "adapter_layers": settings.adapter_layers or _PLAN,
            "seeds": self._n_seeds,
            "tasks": [task.name for task in self.tasks],
            "methods": self._method_names,
            "keeps": self._keeps,
            "regime": asdict(self.lab.regime),
            "sizes": asdict(self._sizes),
            "distill": asdict(self._distill),
            "text": None if settings.text is None else settings.text.name,
            "device": self.device,
        }

    # Cells ------------------------------------------------------------------------------------------------------------

    def _references(self, task: Task) -> dict[str, list[dict[str, Any]]]:
        """What needs no emulator: column -> results, one for each seed or a single one."""
        lab = self.lab
        zero_shot = self.scored(f"{task.name} full_zero_shot", task, "full_zero_shot", lab.middle)
        results = {"full_zero_shot": [zero_shot]}
        trainables = lab.regime.trainables
        results["edge_layers_full_middle"] = self._seeds(
            task, "edge_layers_full_middle", lab.on_edge_layers(lab.middle), method=trainables
        )
        if self.settings.whole_runs:
            results["full_fine_tuned"] = self._seeds(task, "full_fine_tuned", lab.whole_weights(), everything=True)
            results["lora_full"] = self._seeds(task, "lora_full", lab.whole_adapters(), method="lora")
        return results

    def _with_emulator(
        self, built: Built, emulator: Emulator, task: Task, references: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> list[dict[str, Any]]:
        """The rows of one emulator and one task."""
        lab = self.lab
        name = f"{task.name} {built.label} {built.keep:g} emulator_zero_shot"
        zero_shot = self.scored(name, task, "emulator_zero_shot", emulator, emulator=built.sha256)
        tuned = self._seeds(
            task,
            "emulator_tuned",
            lab.on_edge_layers(emulator),
            views={"emulator_tuned": None, "plug_in": lab.middle},
            method=lab.regime.trainables,
            built=built,
        )
        thief = self._seeds(
            task,
            "thief",
            lab.everything(lambda: built.load(self._workshop.checkpoint, self.device)),
            everything=True,
            built=built,
        )
        scores = {name: _by_metric(results, name) for name, results in references.items()}
        scores["emulator_zero_shot"] = _by_metric([zero_shot], "emulator_zero_shot")
        scores["emulator_tuned"] = _by_metric(tuned, "emulator_tuned")
        scores["plug_in"] = _by_metric(tuned, "plug_in")
        better = [
            (trained, "thief") if trained["validation_loss"] < kept["validation_loss"] else (kept, "emulator_tuned")
            for trained, kept in zip(thief, tuned, strict=True)
        ]
        scores["thief"] = _join([scores_of(result, view) for result, view in better])
        return rows_of(
            scores,
            self._n_seeds,
            method=built.label,
            task=task.name,
            keep=built.keep,
            emulator=built.sha256,
            share_given_away=emulator.n_params / lab.middle.n_params,
            learning_rate=tuned[0]["rate"],
            learning_rate_full_middle=references["edge_layers_full_middle"][0]["rate"],
            learning_rate_thief=thief[0]["rate"],
            thief_trains_all=sum(view == "thief" for _, view in better),
        )

    def _seeds(
        self,
        task: Task,
        kind: str,
        build: Any,
        *,
        views: Mapping[str, Any] | None = None,
        method: str = "full",
        everything: bool = False,
        built: Built | None = None,
    ) -> list[dict[str, Any]]:
        lab = self.lab
        return self.over_seeds(
            lab,
            task,
            kind if built is None else f"{built.label} {built.keep:g} {kind}",
            build,
            rates=lab.regime.rates(method, everything=everything),
            seeds=range(self._n_seeds),
            views=views or {kind: None},
            of={"kind": kind, "method": method, "emulator": None if built is None else built.sha256},
            method=method,
        )

    def _expected(self) -> int:
        seeds, n_whole = self._n_seeds, len(_WHOLE) * self.settings.whole_runs
        of_task = 1 + seeds * (1 + n_whole)
        of_emulator = 1 + 2 * seeds
        return len(self.tasks) * (of_task + len(self._methods) * of_emulator)


def _by_metric(results: Sequence[Mapping[str, Any]], view: str) -> dict[str, list[Score]]:
    return _join([scores_of(result, view) for result in results])


def _join(scores: Sequence[Mapping[str, Score]]) -> dict[str, list[Score]]:
    return {metric: [each[metric] for each in scores] for metric in scores[0]}
