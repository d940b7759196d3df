"""The ledger's figures: by mode, attack against task quality, by rarity, by cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from isthmus.experiments.leak.page.ledger_rows import (
    SPACED,
    LedgerRow,
    Value,
    frontier,
    ledger_rows,
    marks,
    measured,
    modes,
    percent,
    spread,
    times,
    zero_shot_ratio,
)
from isthmus.experiments.leak.page.themed_svg import LIGHT, drawing, inline_svg

_COLOURS = [LIGHT[name] for name in ("bad", "accent", "second", "third", "muted")]
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
_PRIOR: dict[str, Any] = {"color": LIGHT["muted"], "linewidth": 1.2, "linestyle": (0, (2, 2))}
_LABEL = 30
"""Characters of a row's name in a figure; the page's table has all of it."""


def draw_all(ledger: Mapping[str, Any]) -> dict[str, str]:
    """Each figure's name, and its SVG as an element for a page.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    rows = ledger_rows(ledger)
    figures: dict[str, Callable[[], str]] = {
        "modes": lambda: draw_modes(rows),
        "frontier": lambda: draw_frontier(rows),
        "rarity": lambda: draw_rarity(rows),
        "cuts": lambda: draw_cuts(ledger.get("runs") or ()),
    }
    return {name: draw() for name, draw in figures.items()}


def draw_modes(rows: Sequence[LedgerRow]) -> str:
    """A hundred squares for each mode, as many of them filled as the strongest attack gets of a hundred tokens."""
    chosen = modes(rows)
    title = "What a cloud can learn in each mode"
    said = "; ".join(f"{name}: {percent(row.exposed)} of the tokens" for name, row in chosen)
    with drawing("modes") as plot:
        figure, panels = plot.subplots(1, max(1, len(chosen)), figsize=(10, 3.15), squeeze=False)
        for axes in panels[0]:
            axes.set_axis_off()
        for axes, (name, row) in zip(panels[0], chosen, strict=False):
            _draw_squares(axes, name, row)
        figure.subplots_adjust(left=0.005, right=0.995, top=1, bottom=0, wspace=0.02)
        return inline_svg(figure, title, said)


def _draw_squares(axes: Any, name: str, row: LedgerRow) -> None:
    filled = 0 if row.exposed is None else round(100 * row.exposed)
    places = [(index % 10, 9 - index // 10) for index in range(100)]
    for part, colour in ((places[:filled], LIGHT["bad"]), (places[filled:], LIGHT["faint"])):
        if part:
            axes.scatter(*zip(*part, strict=True), marker="s", s=64, linewidths=0, color=colour)
    labels = row.worst("label_accuracy")
    lines = [
        f"labels: {percent(labels.value)}" if labels else _without_labels(row),
        "loss: not measured" if row.loss_ratio is None else f"loss: {times(row.loss_ratio)} undefended",
        _short(row.name),
    ]
    of = "of tokens read" if row.worst("token_accuracy") else "by guessing alone"
    axes.text(-0.45, 10.1, name, weight="bold", size=10.5)
    axes.text(-0.45, -2.35, percent(row.exposed), size=19, weight="bold")
    axes.text(-0.45, -3.65, of)
    for line, text in enumerate(lines):
        axes.text(-0.45, -4.85 - 1.05 * line, text, color=LIGHT["muted"], size=9)
    axes.set(xlim=(-0.6, 11.4), ylim=(-7.4, 11.4), aspect="equal", anchor="NW")


def _without_labels(row: LedgerRow) -> str:
    return "labels: no gradient sent" if row.common("mode") in {"emulator", "top-only"} else "labels: not attacked"


def draw_frontier(rows: Sequence[LedgerRow]) -> str:
    """Task loss over the undefended run's, against the tokens that the strongest attack or a blind guess gets."""
    points = marks(rows)
    best = frontier(points)
    title = "Attack against task quality"
    said = "; ".join(f"{row.name}: {percent(row.exposed)} of tokens, loss {times(row.loss_ratio)}" for row in points)
    with drawing("frontier") as plot:
        figure, axes = plot.subplots(figsize=(10, 5.2))
        highest = max([1.5, *((row.loss_ratio or 0) * 1.15 for row in points)])
        lowest = min([0.95, *((row.loss_ratio or 1) / 1.06 for row in points)])
        axes.set(xlim=(0, 102), ylim=(lowest, highest), yscale="log")
        ticks = [tick for tick in (0.5, 0.7, 1, 1.2, 1.5, 2, 3, 5, 7, 10, 20, 50) if lowest <= tick <= highest]
        axes.set_yticks(ticks, [f"{tick:g} \u00d7" for tick in ticks])
        axes.minorticks_off()
        axes.set_xticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)])
        axes.grid()
        axes.set_xlabel("tokens that the strongest attack gets, or a guess without traffic; 95 % interval")
        axes.set_ylabel("task loss over the undefended run's")
        if best:
            corners = [(100 * (row.exposed or 0), row.loss_ratio or 0) for row in best]
            steps = [(102, corners[0][1]), *corners, (corners[-1][0], highest)]
            axes.step(*zip(*steps, strict=True), where="pre", color=LIGHT["accent"], linewidth=1.6, zorder=2)
        zero_shot = zero_shot_ratio(rows)
        if zero_shot is not None:
            axes.axhline(zero_shot, color=LIGHT["muted"], linewidth=1, linestyle="--", zorder=1)
            axes.text(50, zero_shot * 1.01, "without training", color=LIGHT["muted"], ha="center", va="bottom")
        for row in points:
            _draw_point(axes, row, row in best)
        _label_points(axes, points, best)
        axes.text(0.012, 0.02, "↙ better", transform=axes.transAxes, color=LIGHT["muted"], weight="bold")
        figure.subplots_adjust(left=0.085, right=0.7, top=0.97, bottom=0.105)
        return inline_svg(figure, title, said)


def _draw_point(axes: Any, row: LedgerRow, on_frontier: bool) -> None:
    value = row.worst("token_accuracy")
    place = 100 * (row.exposed or 0), row.loss_ratio
    colour = LIGHT["accent"] if on_frontier else LIGHT["muted"]
    if value is not None and value.low is not None and value.high is not None and value.value >= row.blind:
        axes.plot([100 * value.low, 100 * value.high], [place[1]] * 2, color=colour, linewidth=1.2, zorder=3)
    face = colour if value is not None else LIGHT["surface"]  # hollow where nothing is sent
    axes.plot(*place, marker="o", markersize=7, color=colour, markerfacecolor=face, zorder=4, linestyle="none")


def _label_points(axes: Any, points: Sequence[LedgerRow], best: Sequence[LedgerRow]) -> None:
    """Names beside marks that stand alone; others in a column on the right, as most marks lie on one spot."""
    to_share = axes.transAxes.inverted()
    crowd = []
    for row in points:
        across, up = to_share.transform(axes.transData.transform((100 * (row.exposed or 0), row.loss_ratio)))
        if across < 0.6:
            _label(axes, row, (float(across) + 0.018, float(up) + 0.028), row in best)
        else:
            crowd.append((row, float(across), float(up)))
    heights = spread([up for _, _, up in crowd], 0.054, 0.01, 0.985)
    for (row, across, up), height in zip(crowd, heights, strict=True):
        line = {"color": LIGHT["line"], "linewidth": 1, "clip_on": False, "zorder": 1}
        axes.plot([across, 1.07], [up, height], transform=axes.transAxes, **line)
        _label(axes, row, (1.078, height), row in best)


def _label(axes: Any, row: LedgerRow, place: tuple[float, float], on_frontier: bool) -> None:
    axes.text(
        *place,
        _short(row.name),
        transform=axes.transAxes,
        va="center",
        size=9,
        weight="bold" if on_frontier else "normal",
        color=LIGHT["accent"] if on_frontier else LIGHT["text"],
    )


def draw_rarity(rows: Sequence[LedgerRow]) -> str:
    """What the strongest attack gets of all tokens and of rare ones, a line for each row of the grid."""
    shown = [row for row in rows if row.worst("token_accuracy") is not None]
    title = "All tokens and rare tokens"
    said = "; ".join(
        f"{row.name}: {_of(row.worst('token_accuracy'))} of all, {_of(row.worst('rare_accuracy'))} of rare ones"
        for row in shown
    )
    with drawing("rarity") as plot:
        figure, axes = plot.subplots(figsize=(10, 1.15 + 0.27 * max(2, len(shown))))
        for place, row in enumerate(shown):
            every, rare = row.worst("token_accuracy"), row.worst("rare_accuracy")
            ends = [100 * value.value for value in (every, rare) if value is not None]
            axes.plot([min(ends), max(ends)], [place, place], color=LIGHT["line"], linewidth=4, zorder=1)
            _draw_share(axes, every, place, "o", LIGHT["bad"])
            _draw_share(axes, rare, place, "D", LIGHT["third"])
            prior = row.common("prior_accuracy")
            if prior is not None:
                axes.plot(100 * prior, place, marker="|", markersize=11, color=LIGHT["muted"], linestyle="none")
        marks = (("o", "bad", "all tokens"), ("D", "third", "rare tokens"), ("|", "muted", "teacher-forced prior"))
        for marker, colour, label in marks:
            axes.plot([], [], marker=marker, color=LIGHT[colour], linestyle="none", label=label)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, handletextpad=0.2, borderpad=0)
        axes.set_yticks(range(len(shown)), [_short(row.name) for row in shown], color=LIGHT["text"])
        axes.set_xticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)])
        axes.set(xlim=(0, 102), ylim=(max(1, len(shown)) - 0.4, -0.6))
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        height = figure.get_figheight()
        figure.subplots_adjust(left=0.25, right=0.985, top=1 - 0.38 / height, bottom=0.32 / height)
        return inline_svg(figure, title, said)


def _draw_share(axes: Any, value: Value | None, place: float, marker: str, colour: str) -> None:
    if value is None:
        return
    if value.low is not None and value.high is not None:
        axes.plot([100 * value.low, 100 * value.high], [place, place], color=colour, linewidth=1.2, zorder=2)
    axes.plot(100 * value.value, place, marker=marker, markersize=7, color=colour, linestyle="none", zorder=3)


def draw_cuts(runs: Sequence[Mapping[str, Any]]) -> str:
    """What each attack gets of the tokens of an undefended edge over the cut, a panel for each data set."""
    usable = [run for run in runs if _is_plain(run)]
    data = sorted({str(run.get("data") or "") for run in usable})
    title = "By cut: layers that the edge runs below the cloud"
    said = "; ".join(
        f"{run.get('attack')}, {run.get('codec')}, {run.get('data')}, cut {run['cut']}: "
        f"{_of(measured(run, 'token_accuracy'))}"
        for run in usable
    )
    with drawing("cuts") as plot:
        figure, panels = plot.subplots(1, max(1, len(data)), figsize=(10, 4.4), squeeze=False, sharey=True)
        attacks = _by_strength(usable)
        codecs = list(dict.fromkeys(str(run.get("codec")) for run in usable))
        for axes, name in zip(panels[0], data, strict=False):
            _draw_lines(axes, [run for run in usable if str(run.get("data") or "") == name], attacks, codecs)
            axes.set_title(name)
            axes.set_xlabel("layers of the edge below the cut")
        panels[0][0].set(ylim=(0, 103))
        panels[0][0].set_yticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)])
        legend: dict[str, dict[str, Any]] = {}
        for number, attack in enumerate(attacks):
            legend[attack.translate(SPACED)] = {"color": _COLOURS[number % len(_COLOURS)]}
        for number, codec in enumerate(codecs):
            legend[f"over {codec}"] = {"color": LIGHT["text"], "linestyle": _DASHES[number % len(_DASHES)]}
        for label, style in {**legend, "teacher-forced prior": _PRIOR}.items():
            panels[0][0].plot([], [], **style, label=label)
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.05, 1), ncols=4, frameon=False, borderpad=0)
        figure.subplots_adjust(left=0.06, right=0.985, top=0.8, bottom=0.115, wspace=0.08)
        return inline_svg(figure, title, said)


def _is_plain(run: Mapping[str, Any]) -> bool:
    """Whether a run is one of an attack on the tokens of an undefended edge whose front is known."""
    return (
        run.get("mode") == "split"
        and (run.get("defence") or "none") == "none"
        and (run.get("front") or "known") == "known"
        and run.get("cut") is not None
        and run.get("token_accuracy") is not None
    )


def _by_strength(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of attacks, the one that gets most first."""
    found: dict[str, list[float]] = {}
    for run in runs:
        found.setdefault(str(run.get("attack")), []).append(run["token_accuracy"])
    return sorted(found, key=lambda name: -sum(found[name]) / len(found[name]))


def _draw_lines(axes: Any, runs: Sequence[Mapping[str, Any]], attacks: Sequence[str], codecs: Sequence[str]) -> None:
    cuts = sorted({run["cut"] for run in runs})
    for attack, codec in product(attacks, codecs):
        values = {
            cuts.index(run["cut"]): value
            for run in runs
            if (str(run.get("attack")), str(run.get("codec"))) == (attack, codec)
            and (value := measured(run, "token_accuracy")) is not None
        }
        if values:
            colour = _COLOURS[attacks.index(attack) % len(_COLOURS)]
            style = {"color": colour, "linestyle": _DASHES[codecs.index(codec) % len(_DASHES)]}
            line = [(place, 100 * values[place].value) for place in sorted(values)]
            axes.plot(*zip(*line, strict=True), marker="o", markersize=4.5, linewidth=1.6, zorder=3, **style)
            _draw_band(axes, {place: values[place] for place in sorted(values)}, colour)
    priors = {run["cut"]: 100 * run["prior_accuracy"] for run in runs if run.get("prior_accuracy") is not None}
    if priors:
        heights = [priors[cut] for cut in sorted(priors)]
        places = [-0.25, *(cuts.index(cut) for cut in sorted(priors)), len(cuts) - 0.75]
        axes.plot(places, [heights[0], *heights, heights[-1]], **_PRIOR)
    axes.set_xticks(range(len(cuts)), [f"{cut:g}" for cut in cuts])
    axes.set_xlim(-0.25, max(0.25, len(cuts) - 0.75))
    axes.grid(axis="y")


def _draw_band(axes: Any, values: Mapping[int, Value], colour: str) -> None:
    known = [(x, value.low, value.high) for x, value in values.items() if value.low is not None]
    if known:
        places, lows, highs = zip(*known, strict=True)
        axes.fill_between(
            places, [100 * low for low in lows], [100 * high for high in highs], color=colour, alpha=0.13, linewidth=0
        )


def _of(value: Value | None) -> str:
    return percent(None if value is None else value.value)


def _short(name: str) -> str:
    return name if len(name) <= _LABEL else name[: _LABEL - 1].rstrip() + "…"
