"""The experiments on privacy: `isthmus experiment …`."""

from __future__ import annotations

import typer

from isthmus.experiments.leak.leak_settings import LEAK
from isthmus.experiments.leak.weights.leak_weights_settings import LEAK_WEIGHTS

app = typer.Typer(help="Measure what leaks, and what helps.", no_args_is_help=True)
app.command("leak")(LEAK.command())
app.command("leak-weights")(LEAK_WEIGHTS.command())
