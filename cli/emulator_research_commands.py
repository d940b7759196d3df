"""The researcher's commands for emulators: `isthmus emulator table | score | cost | pretrain`."""

from __future__ import annotations

import typer

from isthmus.experiments.harness.emulator_settings import MEASUREMENTS

app = typer.Typer(no_args_is_help=True)
for _name, _measurement in MEASUREMENTS.items():
    app.command(_name)(_measurement.command())
