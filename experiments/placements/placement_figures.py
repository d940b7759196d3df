"""The table of `isthmus bench placements`, and its figures: held-out loss against bytes and budgets, and live sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from isthmus.common.figures import plotting, save_figure
from isthmus.experiments.placements.placement_modes import SINGLE, policy_of


def show(result: Mapping[str, Any]) -> None:
    """Print the result as a table."""
    table = Table(box=None, pad_edge=False)
    for name in ("mode", "step", "up", "down", "trips", "edge FLOPs", "edge memory", "equal", "diff", "score"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for row in result["runs"]:
        table.add_row(
            row["mode"],
            _number(row["step_ratio"], ".2f"),
            _number(row["bytes_per_token_up"], ",.0f"),
            _number(row["bytes_per_token_down"], ",.0f"),
            _number(row["round_trips"], "g"),
            _number(row["edge_flops_share"], ".0%"),
            "-" if row["edge_peak_bytes"] is None else f"{row['edge_peak_bytes'] / 2**20:,.0f} MiB",
            {None: "-", True: "yes", False: "no"}[row["bitwise_equal"]],
            _number(row["max_abs_diff"], ".1e"),
            _number(row["score"], ".4f"),
        )
    Console().print(table)
    print("step: time over a single process's; up, down: bytes per token; equal, diff: to the single process")
    for name, share in (result["kill_revive"] or {}).get("gain_shares", {}).items():
        print(f"{name} has {share:.1%} of always-on's gain")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def draw_losses(result: Mapping[str, Any], path: Path) -> None:
    """Draw each mode's held-out loss over the bytes that it moves for a token; nothing for a mode without both.

    Where nothing crosses after the first epoch, the bytes are the first one's; where a policy chooses sites, they are
    those of its share of always-on's site traffic over a whole run.
    """
    figure, axes = plotting().subplots(figsize=(7, 4.5), dpi=144)
    rows = {row["mode"]: row for row in result["runs"]}
    points = [(bytes_of(row, rows), row["score"], name) for name, row in rows.items()]
    drawn = sorted(point for point in points if point[0] and point[1] is not None)
    for number, (moved, score, name) in enumerate(drawn):
        axes.plot(moved, score, marker="o", color="#1f4e79")
        below = 12 * (number % 2)  # neighbours' names lie on either side
        axes.annotate(name, (moved, score), textcoords="offset points", xytext=(5, 4 - below), fontsize=8)
    axes.margins(0.12)
    axes.set(
        xscale="log",
        xlabel="bytes over the wire per token and step, up and down",
        ylabel="held-out loss",
        title=result["settings"]["model"],
    )
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def draw_budgets(result: Mapping[str, Any], path: Path) -> None:
    """Draw the held-out loss of each policy over the share of always-on's site traffic that it had."""
    figure, axes = plotting().subplots(figsize=(7, 4.5), dpi=144)
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in result["runs"]:
        if row["score"] is not None and row["site_traffic_share"]:
            curves.setdefault(policy_of(row["mode"]), []).append((row["site_traffic_share"], row["score"]))
    for name, points in curves.items():
        shares, scores = zip(*sorted(points), strict=True)
        axes.plot([100 * share for share in shares], scores, marker="o", label=name)
    for row in result["runs"]:
        if row["mode"] in (SINGLE, "edge", "u_shape") and row["score"] is not None:
            axes.axhline(row["score"], color="gray", linewidth=1, linestyle="--")
            place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axes.annotate(row["mode"], (0, row["score"]), xytext=(4, 3), fontsize=8, **place)
    axes.set(xlabel="site traffic, % of always-on", ylabel="held-out loss", title=result["settings"]["model"])
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def bytes_of(row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]] | None = None) -> float:
    """Bytes per token and step in both directions, of the first epoch where later ones are cheaper; 0 if unknown.

    Args:
        rows: All of them, by mode: with those of `edge` and `u_shape` a policy's bytes are those of a whole run.
    """
    share = float(row.get("site_traffic_share") or 0)
    if share and rows and {"edge", "u_shape"} <= rows.keys():
        always, never = bytes_of(rows["edge"]), bytes_of(rows["u_shape"])
        return never + share * (always - never)
    if row["first_epoch_bytes_per_token"]:
        return float(row["first_epoch_bytes_per_token"])
    return float((row["bytes_per_token_up"] or 0) + (row["bytes_per_token_down"] or 0))


def draw_sites(decisions: Sequence[Mapping[str, Any]], steps: int, path: Path) -> None:
    """Draw the live sites of a run over its steps, a line for each site that was ever live after the warm-up.

    Args:
        decisions: `step` and `live`, the names of the sites from that step on.
    """
    names = sorted({name for decision in decisions for name in decision["live"]}, key=_place)
    figure, axes = plotting().subplots(figsize=(7, 1.5 + 0.14 * len(names)), dpi=144)
    ends = [decision["step"] for decision in decisions[1:]] + [steps]
    for row, name in enumerate(names):
        lives = [
            (decision["step"], end - decision["step"])
            for decision, end in zip(decisions, ends, strict=True)
            if name in decision["live"]
        ]
        axes.broken_barh(lives, (row - 0.4, 0.8), color="#1f4e79" if "v_proj" in name else "#f2a33a")
    if decisions:
        axes.axvspan(0, decisions[0]["step"], color="#dddddd")  # the warm-up, in which all take turns
    axes.set_yticks(range(len(names)), [short_name(name) for name in names], fontsize=6)
    title = "live sites of kill-and-revive (grey: warm-up with all; blue: v_proj)"
    axes.set(xlim=(0, steps), ylim=(-1, len(names)), xlabel="optimizer step", title=title)
    save_figure(figure, path)


def _place(name: str) -> tuple[int, str]:
    return next((int(part) for part in name.split(".") if part.isdigit()), 0), name


def short_name(name: str) -> str:
    """A site's layer and linear."""
    layer, full = _place(name)
    return f"{layer} {full.rpartition('.')[2]}"
