"""What `isthmus emulator table` makes, from the flags, and how it is printed."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from isthmus.common.figures import plotting
from isthmus.emulator.distill.distillation import DistillConfig
from isthmus.emulator.package.build import pick_device
from isthmus.experiments.harness.bench_flags import names_of, numbers_of, precision_of
from isthmus.experiments.harness.emulator_settings import TableFlags
from isthmus.experiments.offsite import table_rows
from isthmus.experiments.offsite.frontier import draw
from isthmus.experiments.offsite.table import TableSettings, run_table
from isthmus.experiments.offsite.table_lab import Regime
from isthmus.experiments.scoring.tasks import Sizes


def run(flags: TableFlags) -> dict[str, Any]:
    """Make the table, and draw the frontier if it is asked for. Raises what `run_table` raises."""
    settings = _settings(flags)
    if flags.figure is not None:
        plotting()  # a missing package is reported before the long run, not after it
    result = run_table(settings)
    if flags.figure is not None:
        draw(result["methods"], flags.figure, f"{flags.model}, {flags.tasks}")
    return result


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    table_rows.show(result, Console())


def _settings(flags: TableFlags) -> TableSettings:
    precision = precision_of(flags.precision, "precision")
    return TableSettings(
        model=flags.model,
        tasks=names_of(flags.tasks, "tasks"),
        out=flags.out,
        methods=names_of(flags.methods, "methods"),
        keeps=numbers_of(flags.keep, "keep"),
        adapter_layers=flags.adapter_layers,
        seeds=flags.seeds,
        regime=Regime(
            trainables=flags.trainables,
            steps=flags.steps,
            batch=flags.batch,
            max_length=flags.max_length,
            rank=flags.rank,
            weight_rates=numbers_of(flags.learning_rates, "learning-rates"),
            adapter_rates=numbers_of(flags.adapter_rates, "adapter-rates"),
            whole_rates=numbers_of(flags.whole_rates, "whole-rates"),
            precision=precision,
            score_precision=precision_of(flags.score_precision, "score-precision"),
        ),
        sizes=Sizes(test=flags.test, validation=flags.validation, max_length=flags.max_length),
        text=flags.text,
        text_length=flags.text_length,
        distill=DistillConfig(
            steps=flags.distill_steps,
            batch=flags.distill_batch,
            learning_rate=flags.distill_learning_rate,
            mse_weight=flags.mse_weight,
            lm_weight=flags.lm_weight,
            precision=precision,
        ),
        data_folder=flags.data_folder,
        whole_runs=flags.whole_runs,
        device=pick_device(flags.device),
        threads=flags.threads,
    )
