"""From the scores of the table of emulators to its rows, to what a preset promises, to text and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isthmus.common.figures import plotting, save_figure
from isthmus.experiments.scoring.scores import METRICS, Estimate, Score, gain, mean, share

THIEVES = ("thief", "distilled thief")
"""The rows of a thief, of whom the better one by the scores counts."""
_HEADER = f"{'':18}{'score':>15}{'of reference':>15}{'of split':>15}{'above floor':>15}"


def row_of(scores: Mapping[str, Sequence[Score]], *, best_split: str | None, **about: Any) -> dict[str, Any]:
    """What one preset does on one task, by one metric; `about` is said too.

    Args:
        scores: A score for each seed, or a single one, by row: see `table`.
        best_split: Which of the rows of split training had the lower loss on the validation slice; None without any.

    Returns:
        `rows`, by name: `value`, `seeds`, and where the gain that is divided by is above two standard errors
        `of_reference` and `of_split` (shares of the gain of these over zero-shot) and `above_floor` (the share of the
        way from the floor to the reference). Each has its interval of two standard errors, seeds and texts together, as
        `<name>_interval`. Beside it, where there are these rows, what `isthmus emulator sign --protection` takes, of
        the row with the edge's bridge.
    """
    zero, reference, floor = scores["zero-shot"], scores["reference"], scores["floor"]
    ways = {"of_reference": (zero, reference), "above_floor": (floor, reference)}
    if best_split is not None:
        ways["of_split"] = (zero, scores[best_split])
    clear = {name: way for name, way in ways.items() if gain(way[1], way[0]).is_clear}
    rows: dict[str, dict[str, Any]] = {}
    for name, own in scores.items():
        rows[name] = {"seeds": len(own), **_stated("value", mean(own))}
        for way, (base, best) in clear.items():
            rows[name] |= _stated(way, share(own, base, best))
    metric = str(about["metric"])
    sign = 1 if METRICS[metric] else -1
    thief = max((rows[name] for name in THIEVES if name in rows), key=lambda row: sign * row["value"], default={})
    row = {
        **about,
        "higher_is_better": METRICS[metric],
        "best_split": best_split,
        "rows": rows,
        "full_zero_shot": rows["zero-shot"]["value"],
        "targets": _targets(str(about["preset"]), rows, thief),
    }
    if thief and "edge bridge" in rows:
        row |= {
            "plug_in": rows["edge bridge"]["value"],
            "thief": thief["value"],
            "seeds": thief["seeds"],
            "plug_in_recovery": rows["edge bridge"].get("of_reference"),
            "thief_recovery": thief.get("of_reference"),
        }
    return row


def show(result: Mapping[str, Any]) -> None:
    """Print the table for people, in at most 80 columns."""
    print(table_lines(result["runs"]))


def table_lines(runs: Sequence[Mapping[str, Any]]) -> str:
    """The table for people, at most 80 columns."""
    lines = []
    for run in runs:
        lines += [f"{run['preset']}, {run['task']}, {run['metric']}"[:80], _HEADER]
        for name, row in run["rows"].items():
            shares = "".join(f"{_percent(row, way):>15}" for way in ("of_reference", "of_split", "above_floor"))
            lines.append(f"{name:18}{row['value']:9.3f} ±{_half(row, 'value'):.3f}{shares}")
        lines += [f"{'yes' if reached else 'no ':4}{target}" for target, reached in run["targets"].items()]
        lines.append("")
    return "\n".join(lines).rstrip()


def draw_table(runs: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw what each emulator gives the data owner against what it gives a thief, a point for each task and metric.

    Across is the thief's share of the reference's gain, up that of the plug-in with the edge's bridge; a hollow point
    is the plug-in without. On the diagonal the emulator gives the model away; a good one is high and far to the left.
    Where no gain is clear there is no point.
    """
    figure, axes = plotting().subplots(figsize=(7, 5.5), dpi=144)
    needed = ("thief", "edge bridge", "plug-in")
    points = [run for run in runs if all("of_reference" in run["rows"].get(name, {}) for name in needed)]
    place = {id(run): [100 * run["rows"][name]["of_reference"] for name in needed] for run in points}
    low = min([0.0, *(share for shares in place.values() for share in shares)]) - 5
    high = max([100.0, *(share for shares in place.values() for share in shares)]) + 5
    axes.plot([low, high], [low, high], color="#999999", linewidth=1, label="thief gets as much")
    for preset in dict.fromkeys(run["preset"] for run in points):
        own = [run for run in points if run["preset"] == preset]
        across, bridged, plain = zip(*(place[id(run)] for run in own), strict=True)
        (line,) = axes.plot(across, bridged, marker="o", linewidth=0, label=preset)
        axes.plot(across, plain, marker="o", linewidth=0, color=line.get_color(), fillstyle="none")
        for run in own:
            x, y, _ = place[id(run)]
            axes.annotate(run["task"], (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.set(
        xlim=(low, high),
        ylim=(low, high),
        xlabel="what a thief of the package has, % of the reference's gain",
        ylabel="what plug-in has, % of it",
        title=title,
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def _targets(preset: str, rows: Mapping[str, Mapping[str, Any]], thief: Mapping[str, Any]) -> dict[str, bool]:
    """What fidelity and guarded are for, by sentence, judged by the means alone; nothing where no gain is clear."""
    plain, bridged = (rows.get(name, {}) for name in ("plug-in", "edge bridge"))
    fidelity, guarded = {}, {}
    if {"above_floor", "of_reference"} <= plain.keys():
        reached = plain["of_reference"] >= 0.9 and plain["above_floor"] >= 0.7
        fidelity["90 % of reference's gain and 70 % above the floor without public text"] = reached
    if "of_reference" in bridged:
        fidelity["97 % with the edge's bridge (the aim)"] = bridged["of_reference"] >= 0.97
    if "above_floor" in bridged:
        guarded["40 % above the floor with the edge's bridge"] = bridged["above_floor"] >= 0.4
    if "of_reference" in bridged and "of_reference" in thief:
        guarded["the thief 30 points below"] = bridged["of_reference"] - thief["of_reference"] >= 0.3
    return {"fidelity": fidelity, "guarded": guarded, "whole": fidelity}.get(preset, fidelity | guarded)


def _stated(name: str, estimate: Estimate) -> dict[str, Any]:
    around = 2 * estimate.error
    return {name: estimate.value, f"{name}_interval": [estimate.value - around, estimate.value + around]}


def _half(row: Mapping[str, Any], name: str) -> float:
    low, high = row[f"{name}_interval"]
    return float(high - low) / 2


def _percent(row: Mapping[str, Any], name: str) -> str:
    return f"{100 * row[name]:.0f} ±{100 * _half(row, name):.0f} %" if name in row else "-"
