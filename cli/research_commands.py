"""The researcher's commands: `isthmus experiment …`, and `isthmus emulator table | score | cost | pretrain`."""

from __future__ import annotations

import typer

from isthmus.experiments.harness.emulator_settings import MEASUREMENTS
from isthmus.experiments.leak.leak_settings import LEAK
from isthmus.experiments.leak.weights.leak_weights_settings import LEAK_WEIGHTS

experiment = typer.Typer(help="Measure what leaks, and what helps.", no_args_is_help=True)
experiment.command("leak")(LEAK.command())
experiment.command("leak-weights")(LEAK_WEIGHTS.command())

emulator_scores = typer.Typer(no_args_is_help=True)
for _name, _measurement in MEASUREMENTS.items():
    emulator_scores.command(_name)(_measurement.command())
