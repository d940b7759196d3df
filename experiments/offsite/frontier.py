"""What a method gives the data owner against what it gives a thief, at several sizes of the emulator.

Each emulator is a point: the share of the reference's gain that plug-in recovers, over the share that a thief of the
package has. A hollow point beside it stands for a thief who trains no more than the data owner does. On the diagonal
the emulator does what the middle does, so it gives the model away; a good one is high and far to the left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isthmus.common.figures import plotting, save_figure
from isthmus.experiments.offsite.table_rows import PROTECTION_GAP

_COLOURS = ("#1f4e79", "#f2a33a", "#3a7d44", "#b5302a", "#7b4fa3", "#008b9a", "#8a6d3b", "#555555")


_SHARES = ("plug_in_recovery", "emulator_tuned_recovery", "thief_recovery")


def draw(methods: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw the methods of a table's result to a PNG.

    Args:
        methods: `method`, `keep`, `plug_in_recovery`, `emulator_tuned_recovery`, `thief_recovery`; those without a
            recovery have no point.
    """
    points = [entry for entry in methods if entry["plug_in_recovery"] is not None]
    figure, axes = plotting().subplots(figsize=(7, 5.5), dpi=144)
    shares = [100 * point[name] for point in points for name in _SHARES]
    low, high = min([0.0, *shares]) - 5, max([100.0, *shares]) + 5
    axes.plot([low, high], [low, high], color="#999999", linewidth=1, label="thief gets as much")
    gap = 100 * PROTECTION_GAP
    axes.plot(
        [low, high], [low + gap, high + gap], color="#999999", linewidth=1, linestyle="--", label="20 points less"
    )
    for index, method in enumerate(dict.fromkeys(point["method"] for point in points)):
        own = sorted((point for point in points if point["method"] == method), key=lambda point: float(point["keep"]))
        across = [100 * point["thief_recovery"] for point in own]
        same = [100 * point["emulator_tuned_recovery"] for point in own]
        up = [100 * point["plug_in_recovery"] for point in own]
        colour = _COLOURS[index % len(_COLOURS)]
        axes.plot(across, up, marker="o", linewidth=0.8, color=colour, label=method)
        axes.plot(same, up, marker="o", linewidth=0, color=colour, fillstyle="none")
        for point, x, y in zip(own, across, up, strict=True):
            axes.annotate(f"{point['keep']:g}", (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.set(
        xlim=(low, high),
        ylim=(low, high),
        xlabel="what a thief of the package gets, % of the gain",
        ylabel="what plug-in recovers, % of the gain",
        title=title,
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)
