"""The commands of measuring: `isthmus bench …` and `isthmus demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isthmus.experiments.harness.bench_settings import MEASUREMENTS

bench = typer.Typer(help="Measure; every figure in the documents comes from one of these.", no_args_is_help=True)
for _name, _measurement in MEASUREMENTS.items():
    bench.command(_name)(_measurement.command())


def demo(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 40,
    threads: Annotated[int, typer.Option(min=1, help="torch threads on either side.")] = 2,
    keep: Annotated[
        Path | None, typer.Option(help="Folder for the run's files; by default they are gone afterwards.")
    ] = None,
) -> None:
    """Tune SmolLM2-135M across the wire on generated tickets, show what it learned and what crossed, and prove parity.

    Example: isthmus demo
    """
    from isthmus.common.shutdown import interruptible
    from isthmus.experiments.benchmarks.demo import run_demo
    from isthmus.experiments.harness.launch import working_folder

    with interruptible(), working_folder(keep) as folder:
        run_demo(folder, steps, threads)
