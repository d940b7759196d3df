"""From the scores of a table's runs to its rows, its verdict, and what a person sees. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from isthmus.common.figures import plotting, save_figure
from isthmus.experiments.offsite.preset_rows import preset_lines
from isthmus.experiments.scoring.scores import METRICS, Score, gain, mean

FIELDS = (
    "full_zero_shot",
    "emulator_zero_shot",
    "emulator_tuned",
    "plug_in",
    "full_fine_tuned",
    "lora_full",
    "edge_layers_full_middle",
    "thief",
)
"""The columns of the table; all but the zero shots are means over seeds."""

_SHORT = {
    "full_zero_shot": "full",
    "emulator_zero_shot": "emulator",
    "emulator_tuned": "tuned",
    "plug_in": "plug-in",
    "edge_layers_full_middle": "reference",
    "full_fine_tuned": "all tuned",
    "lora_full": "LoRA",
    "thief": "thief",
}
"""The columns as a person sees them; `reference` are the edge's layers tuned over the full middle."""

RECOVERIES = ("plug_in", "emulator_tuned", "thief")
"""The columns whose share of the reference's gain is reported: the data owner's, that of a thief who trains what the
data owner trains, and that of a thief who trains whatever is best."""

PROTECTION_GAP = 0.2
"""How much lower the thief's recovery should be than the plug-in's."""

_COLOURS = ("#1f4e79", "#f2a33a", "#3a7d44", "#b5302a", "#7b4fa3", "#008b9a", "#8a6d3b", "#555555")


def rows_of(scores: Mapping[str, Mapping[str, Sequence[Score]]], seeds: int, **about: Any) -> list[dict[str, Any]]:
    """One row for each metric of one emulator on one task; `about` is said in each row.

    `scores` has, by column and metric, a score for each seed or a single one. A column that was not run is missing.

    `<column>_se` is the standard error of a column, of seeds and held-out documents together. `gain` is what the edge's
    layers gain with the full middle, and `signal` whether it is above two of its standard errors; without signal the
    recoveries are null. `plug_in_recovery`, `emulator_tuned_recovery` and `thief_recovery` are shares of that gain.
    """
    rows = []
    for metric in scores["full_zero_shot"]:
        columns = {name: scores[name][metric] for name in FIELDS if name in scores}
        base = columns["full_zero_shot"]
        reference = gain(columns["edge_layers_full_middle"], base)
        signal = reference.is_clear
        row: dict[str, Any] = {**about, "metric": metric, "higher_is_better": METRICS[metric], "seeds": seeds}
        for name in FIELDS:
            row[name] = mean(columns[name]).value if name in columns else None
        for name in FIELDS:
            row[f"{name}_se"] = mean(columns[name]).error if name in columns else None
        row |= {"gain": reference.value, "gain_se": reference.error, "signal": signal}
        for name in RECOVERIES:
            row[f"{name}_recovery"] = gain(columns[name], base).value / reference.value if signal else None
        for name, other in (("zero_shot", "full_zero_shot"), ("emulator_tuned", "emulator_tuned")):
            margin = gain(columns["plug_in"], columns[other])
            row[f"plug_in_over_{name}"], row[f"plug_in_over_{name}_se"] = margin.value, margin.error
        rows.append(row)
    return rows


def verdict_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the table says: for each method whether plug-in wins on every row with signal, and the mean recoveries.

    Returns:
        `verdict` (a list with an entry for each row with signal), `no_signal` (task and metric of the others) and
        `methods` (a list with the means over the rows with signal).
    """
    verdict = []
    no_signal: list[dict[str, Any]] = []
    for row in rows:
        if not row["signal"]:
            entry = {name: row[name] for name in ("task", "metric", "gain", "gain_se")}
            if entry not in no_signal:
                no_signal.append(entry)
            continue
        verdict.append(
            {
                **{name: row[name] for name in ("method", "keep", "task", "metric")},
                "plug_in_beats_zero_shot": row["plug_in_over_zero_shot"] > 0,
                "plug_in_beats_emulator_tuned": row["plug_in_over_emulator_tuned"] > 0,
                "protected": row["plug_in_recovery"] - row["thief_recovery"] >= PROTECTION_GAP,
                "protected_with_the_same_trainables": row["plug_in_recovery"] - row["emulator_tuned_recovery"]
                >= PROTECTION_GAP,
            }
        )
    methods = []
    for method, keep in dict.fromkeys((row["method"], row["keep"]) for row in rows):
        own = [row for row in rows if (row["method"], row["keep"]) == (method, keep) and row["signal"]]
        won = [entry for entry in verdict if (entry["method"], entry["keep"]) == (method, keep)]
        methods.append(
            {
                "method": method,
                "keep": keep,
                "rows_with_signal": len(own),
                **{f"{name}_recovery": _mean([row[f"{name}_recovery"] for row in own]) for name in RECOVERIES},
                "share_given_away": next(
                    row["share_given_away"] for row in rows if (row["method"], row["keep"]) == (method, keep)
                ),
                "plug_in_beats_zero_shot": sum(entry["plug_in_beats_zero_shot"] for entry in won),
                "plug_in_beats_emulator_tuned": sum(entry["plug_in_beats_emulator_tuned"] for entry in won),
            }
        )
    return {"verdict": verdict, "no_signal": no_signal, "methods": methods}


def show(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a table's result for people, on standard output unless `console` is another."""
    console = console or Console()
    if "preset" in result["runs"][0]:
        console.print(preset_lines(result["runs"]), markup=False, highlight=False, soft_wrap=True)
        return
    for method, keep in dict.fromkeys((row["method"], row["keep"]) for row in result["runs"]):
        table = Table(title=f"{method}, keep {keep:g}", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
        for name in ("task", "metric"):
            table.add_column(name, min_width=8)
        for name in (*_SHORT.values(), "recovers", "tuned has", "thief has"):
            table.add_column(name, justify="right", min_width=len(name))
        for row in result["runs"]:
            if (row["method"], row["keep"]) == (method, keep):
                figures = ["-" if row[name] is None else f"{row[name]:.3f}" for name in _SHORT]
                shares = [_percent(row[f"{name}_recovery"]) for name in RECOVERIES]
                table.add_row(row["task"], row["metric"].removeprefix("completion_"), *figures, *shares)
        console.print(table, crop=False)
    for entry in result["methods"]:
        n = entry["rows_with_signal"]
        console.print(
            f"{entry['method']}, keep {entry['keep']:g}: plug-in recovers {_percent(entry['plug_in_recovery'])}, "
            f"the tuned emulator has {_percent(entry['emulator_tuned_recovery'])}, a thief "
            f"{_percent(entry['thief_recovery'])} (means over {n} rows with signal); plug-in beats zero-shot on "
            f"{entry['plug_in_beats_zero_shot']} of {n}, the tuned emulator on {entry['plug_in_beats_emulator_tuned']}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    for entry in result["no_signal"]:
        console.print(
            f"no signal: {entry['task']}, {entry['metric']} (gain {entry['gain']:.4f}, standard error "
            f"{entry['gain_se']:.4f})",
            markup=False,
            highlight=False,
        )


def draw_frontier(methods: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw what each method gives the data owner against what it gives a thief, at several sizes of the emulator.

    Each emulator is a point: the share of the reference's gain that plug-in recovers, over the share that a thief of
    the package has. A hollow point beside it stands for a thief who trains no more than the data owner does. On the
    diagonal the emulator does what the middle does, so it gives the model away; a good one is high and far to the left.

    Args:
        methods: `methods` of a table's result; those without a recovery have no point.
    """
    points = [entry for entry in methods if entry["plug_in_recovery"] is not None]
    figure, axes = plotting().subplots(figsize=(7, 5.5), dpi=144)
    shares = [100 * point[f"{name}_recovery"] for point in points for name in RECOVERIES]
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


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"
