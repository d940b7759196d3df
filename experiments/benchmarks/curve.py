"""A whole run by the command line alone, and its loss curve beside the single-process run's.

The split run is `isthmus cloud serve` and `isthmus edge train` as a user starts them; the other one is the same
trainer on the whole model in one process. The curves are drawn over each other: at fp32 they are one line.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from isthmus.common.figures import plotting, save_figure
from isthmus.experiments.harness.bench_settings import CurveSettings
from isthmus.experiments.harness.launch import LocalCloud
from isthmus.experiments.harness.processes import run_isthmus, train_flags
from isthmus.experiments.harness.single_process import losses_of, parity_of, train_whole


def run_curve(settings: CurveSettings, folder: Path) -> dict[str, Any]:
    """Train both ways, compare step by step, and draw the curves.

    Returns:
        The report of the split run, the losses of both, and their largest difference.
    """
    options = asdict(settings)
    model, edge_layers, figure = (options.pop(name) for name in ("model", "edge_layers", "figure"))
    options = {name: value for name, value in options.items() if value is not None}
    if figure is not None:
        plotting()  # before the long run, not after it
    # Alone in the cloud, so that its calls have as many threads as the single process's, however short they are.
    serve = ("--edge-layers", edge_layers, "--threads", str(options["threads"]), "--batching", "off")
    with LocalCloud(folder, model, *serve) as cloud:
        edge = ("--cloud", str(cloud.connection_file), "--key", str(cloud.edge_key), "--out", str(folder / "split"))
        report = run_isthmus("edge", "train", *edge, *train_flags(options))
    train_whole(model, edge_layers, {**options, "out": str(folder / "single")})
    losses = {name: losses_of(folder / name) for name in ("split", "single")}
    if figure is not None:
        _draw(losses, figure, f"{model}, edge layers {edge_layers}, {Path(options['data']).parent.name}")
    return {"report": report, **parity_of(folder / "split", folder / "single"), "losses": losses}


def _draw(losses: dict[str, list[float]], path: Path, title: str) -> None:
    figure, axes = plotting().subplots(figsize=(7, 4), dpi=144)
    steps = range(1, len(losses["split"]) + 1)
    axes.plot(steps, losses["single"], color="#f2a33a", linewidth=5, label="one process")
    axes.plot(steps, losses["split"], color="#1f4e79", linewidth=1.2, label="across the wire")
    axes.set(xlabel="optimizer step", ylabel="training loss", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
