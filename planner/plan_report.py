"""What `isthmus plan` says: the modes side by side, a recommendation in one sentence, and what was assumed. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from rich.table import Table

from isthmus.common.readable import period, size
from isthmus.edge.config.client_config import FIT_TOKENS
from isthmus.emulator.package.build_presets import PRESETS
from isthmus.planner.cost_model import TRAINS_INSIDE, ModeCost, PackageCost, PlanSettings, StepCost
from isthmus.planner.link_spec import LOCAL, LinkSpec
from isthmus.planner.speed_profile import ITEM_BYTES, SpeedProfile
from isthmus.privacy.ledger.mode_leaks import CHANNELS, CLOUD_READS, MODE_LEAKS

Goal = Literal["quality", "speed", "privacy"]

NO_LIMITS: Mapping[str, float] = MappingProxyType({})

TOLERATED = 1.5
"""So many times as long may `edge` take as `u_shape`, before that one is better."""

MEASURED_LEAK = "docs/results.md#what-a-cloud-learns"
"""Where the documents have what was read from split training."""

NOT_GIVEN = (
    "Whoever keeps a package can tune it, and has a copy of the model.",
    "The adapter is tuned on a stand-in: how much of split training's gain it keeps is measured by `isthmus emulator "
    "table --preset`, and not predicted here.",
    "Plugged into the cloud, the adapter is used with prompts that cross, and a cloud that attacks reads them. They do "
    "not where the tuned package answers on this machine, or a whole checkpoint that the owner made with `isthmus "
    "emulator plug`.",
)
"""What the private mode does not give."""

TUNING_ASSUMED = (
    "On a package all linears of the layers above the emulator are tuned, or of all the edge's (whole), at the advised "
    "rank. "
    "The frozen layers take their time in batches, though `tune` computes them text by text; "
    "bridges are counted in bytes alone, one for each dropped layer and one at the end."
)

_TYPED = {
    "single": "one process, no cloud",
    "u_shape": "split: no further option",
    "tail_cache": "top only",
    "taps": "--method ladder",
    "edge": "--sites all",
    "kill_revive": "--sites all --site-policy kill-revive",
    "low_rank": "--sites all --method low_rank",
    "leased": "--sites all --leased all",
    "emulator": "isthmus emulator tune",
}


def rows(costs: Sequence[ModeCost], positions: int, steps: int) -> list[dict[str, Any]]:
    """One row per mode, for JSON. Where later epochs are cheaper, the plain keys are theirs.

    Args:
        positions: Token positions of a step.
        steps: Steps whose time is given.
    """
    return [_row(cost, positions, steps) for cost in costs]


def recommend(
    costs: Sequence[ModeCost],
    goal: Goal,
    positions: int,
    steps: int,
    memory_bytes: int,
    limits: Mapping[str, float] = NO_LIMITS,
) -> str:
    """What to use and why, in one sentence.

    `single` is no choice, as it needs data and weights in one place, nor is `leased`, which lends the adapter to the
    cloud, nor anything that needs more memory than the edge has.

    quality: `edge`, which learned most where the modes were compared, unless `u_shape` is much quicker.
    speed: the shortest step, of later epochs where they are cheaper.
    privacy: the shortest step of what keeps the leak budget; without one, nothing may be given up.

    Args:
        positions: Token positions of a step.
        steps: Steps whose time is given.
        memory_bytes: Memory that the edge has; 0 if unknown.
        limits: The leak budget, which a mode must keep for any goal; see `isthmus.privacy.ledger.mode_leaks`.
    """
    limits = budget_of(goal, limits)
    split = [cost for cost in costs if cost.mode not in {"single", "leased"}]
    choices = [cost for cost in split if not memory_bytes or cost.edge_memory <= memory_bytes]
    if not choices:
        least = min(split, key=lambda cost: cost.edge_memory)
        return (
            f"No mode fits the edge's {size(memory_bytes)}: {_title(least)} needs the least, "
            f"{size(least.edge_memory)}, so use a smaller batch or fewer edge layers."
        )
    keeping = [cost for cost in choices if MODE_LEAKS[cost.mode].keeps(limits)]
    if not keeping:
        return (
            f"No mode that fits the edge keeps {_budget(limits)}: raise the budget, or give the edge the memory of an "
            "emulator."
        )
    chosen, beside = _RULES[goal](keeping)
    return f"Use {_title(chosen)} ({MODE_LEAKS[chosen.mode].how}): {_figures(chosen, positions, steps)}; {beside}."


def budget_of(goal: Goal, limits: Mapping[str, float]) -> dict[str, float]:
    """The leak budget of a plan: for privacy nothing at all, unless it says more."""
    return dict(limits) if limits or goal != "privacy" else dict.fromkeys(CHANNELS, 0.0)


def budget_lines(costs: Sequence[ModeCost], goal: Goal, limits: Mapping[str, float]) -> list[str]:
    """Which modes keep the leak budget and why, a line each; none without a budget."""
    limits = budget_of(goal, limits)
    if not limits:
        return []
    leaks = [MODE_LEAKS[cost.mode] for cost in costs if cost.mode in MODE_LEAKS]
    kept = [leak for leak in leaks if leak.keeps(limits)]
    only = f": {kept[0].title} only" if len(kept) == 1 else ""
    lines = [f"Leak budget {_budget(limits)}{only}. What attacks are taken to recover (without a defence):"]
    lines += [f"{leak.title} {'keeps' if leak in kept else 'breaks'} it: {leak.why()}" for leak in leaks]
    return [
        *lines,
        "These bounds are assumed from what each mode sends, and nothing was attacked. A label that is a token of the "
        "text is sent as one, unless --withhold-answers keeps it back. `isthmus edge train --leak-budget` measures a "
        "run with its own texts and defence.",
    ]


def private_json(
    packages: Sequence[PackageCost], costs: Sequence[ModeCost], link: LinkSpec, memory_bytes: int, hidden: int
) -> dict[str, Any]:
    """The private mode first, each preset with what it needs and does not give; and split training after it.

    Args:
        packages: Of the presets.
        costs: Of all modes.
        memory_bytes: Memory that the edge has; 0 if unknown.
        hidden: Width of the hidden states, of which `emulator fit` sends one a token, and gets one back.
    """
    fit_bytes = FIT_TOKENS * hidden * ITEM_BYTES["fp32"]
    split = next((cost for cost in costs if cost.mode == "u_shape"), None)
    return {
        "presets": [
            {
                "preset": each.preset,
                "plan": str(each.plan),
                "kept_layers": each.kept,
                "first_epoch_step_s": (each.tuning.first_epoch or each.tuning.step).seconds,
                "later_epoch_step_s": each.tuning.step.seconds,
                "edge_memory_bytes": round(each.tuning.edge_memory),
                "fits_memory": None if not memory_bytes else each.tuning.edge_memory <= memory_bytes,
                "package_bytes": each.package_bytes,
                "fetch_s": link.seconds(each.package_bytes, 1),
                "does_not_give": PRESETS[each.preset].gives_not,
            }
            for each in packages
        ],
        "fit": {"tokens": FIT_TOKENS, "bytes_each_way": fit_bytes, "transfer_s": link.seconds(2 * fit_bytes, 1)},
        "does_not_give": list(NOT_GIVEN),
        "split": None if split is None else {"step_s": split.step.seconds, "cloud_reads": CLOUD_READS},
        "measured": MEASURED_LEAK,
        "assumptions": TUNING_ASSUMED,
    }


def private_lines(private: Mapping[str, Any], link: LinkSpec) -> list[str]:
    """The same for a person, from `private_json`."""
    lines = ["First, the private mode: `isthmus emulator tune`. While it trains, nothing of the texts is sent."]
    for each in private["presets"]:
        wait = "" if link.text == LOCAL else f", {period(each['fetch_s'])} over this link"
        lacks = "; this machine has less free" if each["fits_memory"] is False else ""
        lines.append(
            f"- {each['preset']} ({each['plan']}, {each['kept_layers']} layers of the emulator): "
            f"{_short(each['first_epoch_step_s'])} a step in the first epoch and {_short(each['later_epoch_step_s'])} "
            f"later; {size(each['edge_memory_bytes'])} of memory{lacks}; a package of about "
            f"{size(each['package_bytes'])} to fetch{wait}. "
            f"{each['does_not_give'][0].upper()}{each['does_not_give'][1:]}."
        )
    if private["presets"]:
        fit = private["fit"]
        wait = "" if link.text == LOCAL else f", {period(fit['transfer_s'])} of transfer over this link"
        lines.append(
            "- `isthmus emulator fit` makes the emulator nearer to the cloud's layers with public texts, which the "
            f"cloud can read: {fit['tokens']:,} tokens are {size(fit['bytes_each_way'])} each way{wait}."
        )
    else:
        lines.append("- The model has too few layers for a preset's package.")
    lines += [f"- {each}" for each in (*private["does_not_give"], private["assumptions"])]
    split = private["split"]
    if split is not None:
        lines.append(
            f"Second, split training: {_short(split['step_s'])} a step. {split['cloud_reads']} Measured: "
            f"{private['measured']}"
        )
    return lines


def assumptions(
    settings: PlanSettings,
    link: LinkSpec,
    edge: SpeedProfile,
    cloud: SpeedProfile,
    package: PackageCost | None = None,
) -> list[str]:
    """All that the figures rest on, a line each, by the names of JSON.

    Args:
        package: What the row `emulator` is of, where it is a preset's package.
    """
    lines = [
        f"A step is one micro-batch of {settings.batch} x {settings.length} positions; edge and cloud take turns.",
        f"Edge: measured at {_conditions(edge)}. Cloud: {'the same' if cloud is edge else _conditions(cloud)}.",
        f"LoRA of rank {settings.rank}; kill_revive leaves {settings.live_share:.0%} of the sites' traffic on average "
        f"over a run; taps has {settings.taps} taps of {_width(settings)}; emulator "
        + (f"keeps {settings.emulator_keep:.0%} of the cloud's layers." if package is None else _row_of(package)),
        f"tail_cache and taps are given for epochs after the first; tail_cache is for the plan 0:{settings.plan.top}.",
        "Bytes are of whole sealed frames; gRPC, HTTP/2, TCP and TLS add about 1 %. What a session says once (its "
        "handshake, its list of sites) is not counted.",
        "Memory counts the process, weights, adapters with their optimizer, what autograd keeps and three tensors of "
        "logits; allocators need more.",
    ]
    if link.text != LOCAL:
        lines.append("The link's rate holds in either direction and from the first byte: no loss, no slow start.")
    return lines


def notes(
    settings: PlanSettings, edge: SpeedProfile, cloud: SpeedProfile, package: PackageCost | None = None
) -> list[str]:
    """What a person has to know to read the table, a line each; `package` as in `assumptions`."""
    of_package = [] if package is None else [f"isthmus emulator tune: {_row_of(package)}"]
    return [
        *of_package,
        f"A step is {settings.batch} x {settings.length} positions with LoRA of rank {settings.rank}, measured on the "
        f"edge at {_conditions(edge)}; the cloud at {'the same' if cloud is edge else _conditions(cloud)}.",
        f"Top only: the cloud serves --edge-layers 0:{settings.plan.top}. Cached: with --span-cache-mib, after the "
        "first epoch.",
        "A draft pays above its break-even; its acceptance rate is assumed unless you give --acceptance-rate.",
        "--json has directions, round trips, FLOPs, and all that is assumed.",
    ]


def _row_of(package: PackageCost) -> str:
    return (
        f"is over the package {package.preset}, split {package.plan}, which keeps {package.kept} layers, with its "
        "owner's rank; cached are its kept outputs (--keep-outputs-gib)."
    )


def table(costs: Sequence[ModeCost], positions: int, steps: int) -> Table:
    """The modes for a person, in 80 columns."""
    result = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("isthmus edge train ...", "s/step", f"{steps} steps", "per token", "memory"):
        result.add_column(name, justify="left" if name.startswith("isthmus") else "right", no_wrap=True)
    for cost in costs:
        name = _TYPED[cost.mode]
        if cost.first_epoch is not None:
            result.add_row(f"{name}, first epoch", *_cells(cost, cost.first_epoch, positions, steps))
            name += ", cached"
        result.add_row(name, *_cells(cost, cost.step, positions, steps))
    return result


def _row(cost: ModeCost, positions: int, steps: int) -> dict[str, Any]:
    step, first, leak = cost.step, cost.first_epoch, MODE_LEAKS.get(cost.mode)
    row: dict[str, Any] = {"mode": cost.mode, "trains_inside": cost.mode in TRAINS_INSIDE, "step_s": step.seconds}
    row |= {"command": None if leak is None else leak.how, "steps_s": steps * step.seconds}
    row |= {f"leak_{channel}": None if leak is None else leak.bound(channel) for channel in CHANNELS}
    if first is not None:
        row |= {
            "first_epoch_step_s": first.seconds,
            "first_epoch_bytes_up": round(first.traffic.up),
            "first_epoch_bytes_down": round(first.traffic.down),
            "first_epoch_round_trips": first.traffic.round_trips,
        }
    return row | {
        "edge_s": step.edge.seconds,
        "cloud_s": step.cloud.seconds,
        "strip_s": step.wire_s,
        "bytes_up": round(step.traffic.up),
        "bytes_down": round(step.traffic.down),
        "bytes_per_token": step.traffic.total / positions,
        "round_trips": step.traffic.round_trips,
        "edge_memory_bytes": round(cost.edge_memory),
        "cloud_memory_bytes": round(cost.cloud_memory),
        "edge_flops": round(step.edge.flops),
        "edge_flops_share": step.edge.flops / (step.edge.flops + step.cloud.flops),
    }


def _cells(cost: ModeCost, step: StepCost, positions: int, steps: int) -> list[str]:
    seconds = f"{step.seconds:.3g}" if step.seconds < 1000 else f"{step.seconds:.0f}"
    per_token = size(step.traffic.total / positions)
    return [seconds, period(steps * step.seconds), per_token, size(cost.edge_memory)]


def _figures(cost: ModeCost, positions: int, steps: int) -> str:
    text = f"{_time(cost)} per step and {period(steps * cost.step.seconds)} for {steps}"
    first = cost.first_epoch
    if first is not None:
        text += f" after the first epoch, whose steps take {_time(cost, first)}"
        if first.traffic.total:
            return f"{text} and {size(first.traffic.total / positions)} per token"
        return f"{text}, and nothing crosses the link"
    if not cost.step.traffic.total:
        return f"{text}, and nothing crosses the link"
    return f"{text}, {size(cost.step.traffic.total / positions)} per token"


def _time(cost: ModeCost, step: StepCost | None = None) -> str:
    return _short((step or cost.step).seconds)


def _short(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _seconds(cost: ModeCost) -> float:
    return cost.step.seconds


def _title(cost: ModeCost) -> str:
    return MODE_LEAKS[cost.mode].title


def _for_quality(choices: Sequence[ModeCost]) -> tuple[ModeCost, str]:
    split, sites = (next((cost for cost in choices if cost.mode == mode), None) for mode in ("u_shape", "edge"))
    if sites is not None and (split is None or _seconds(sites) <= TOLERATED * _seconds(split)):
        other = "" if split is None else f"; split would take {_time(split)} and keeps the adapter from the cloud"
        return sites, f"sites in all layers learned most where the modes were compared{other}"
    if split is None:
        return min(choices, key=_seconds), "split and sites break the leak budget or need more memory than the edge has"
    if sites is None:
        return split, "sites in all layers, which learn more, need more memory than the edge has"
    return split, f"sites in all layers, which learn more, would take {_time(sites)} over this link"


def _for_speed(choices: Sequence[ModeCost]) -> tuple[ModeCost, str]:
    chosen = min(choices, key=_seconds)
    split = next((cost for cost in choices if cost.mode == "u_shape" and cost is not chosen), None)
    other = "" if split is None else f"; split would take {_time(split)}"
    return chosen, f"no step is shorter{other}"


def _for_privacy(choices: Sequence[ModeCost]) -> tuple[ModeCost, str]:
    chosen = min(choices, key=_seconds)
    if len(choices) == 1:
        return chosen, "no other mode keeps the leak budget"
    others = " and ".join(_title(cost) for cost in choices if cost is not chosen)
    return chosen, f"the leak budget is kept by {others}, too"


def _budget(limits: Mapping[str, float]) -> str:
    return " and ".join(f"{channel}<={limit:g}" for channel, limit in limits.items())


_RULES: dict[Goal, Callable[[Sequence[ModeCost]], tuple[ModeCost, str]]] = {
    "quality": _for_quality,
    "speed": _for_speed,
    "privacy": _for_privacy,
}


def _width(settings: PlanSettings) -> str:
    return "the full width" if settings.tap_width is None else f"width {settings.tap_width}"


def _conditions(speed: SpeedProfile) -> str:
    return f"{speed.batch} x {speed.length}, {speed.dtype}, {speed.threads} thread{'s' if speed.threads > 1 else ''}"
