"""What `isthmus plan` says: the modes side by side, a recommendation in one sentence, and what was assumed. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from rich.table import Table

from isthmus.common.readable import size
from isthmus.planner.cost_model import TRAINS_INSIDE, ModeCost, PlanSettings, StepCost
from isthmus.planner.link_spec import LOCAL, LinkSpec
from isthmus.planner.speed_profile import SpeedProfile
from isthmus.privacy.ledger.mode_leaks import CHANNELS, MODE_LEAKS, ModeLeak

Goal = Literal["quality", "speed", "privacy"]

NO_LIMITS: Mapping[str, float] = MappingProxyType({})

TOLERATED = 1.5
"""So many times as long may `edge` take as the quickest other mode that trains inside, before that one is better."""


def rows(costs: Sequence[ModeCost], positions: int) -> list[dict[str, Any]]:
    """One row per mode, for JSON. Where later epochs are cheaper, the plain keys are theirs.

    Args:
        positions: Token positions of a step.
    """
    return [_row(cost, positions) for cost in costs]


def recommend(
    costs: Sequence[ModeCost],
    goal: Goal,
    positions: int,
    memory_bytes: int,
    limits: Mapping[str, float] = NO_LIMITS,
) -> str:
    """What to use, in one sentence.

    `single` is no choice, as it needs data and weights in one place, nor is `leased`, which lends the adapter to the
    cloud, nor anything that needs more memory than the edge has.

    quality: a mode that trains inside the cloud's layers: `edge`, unless another is much quicker.
    speed: the shortest step, of later epochs where they are cheaper.
    privacy: the shortest step of what keeps the leak budget; without one, nothing may be given up.

    Args:
        positions: Token positions of a step.
        memory_bytes: Memory that the edge has; 0 if unknown.
        limits: The leak budget, which a mode must keep for any goal; see `isthmus.privacy.ledger.mode_leaks`.
    """
    limits = budget_of(goal, limits)
    split = [cost for cost in costs if cost.mode not in {"single", "leased"}]
    choices = [cost for cost in split if not memory_bytes or cost.edge_memory <= memory_bytes]
    if not choices:
        least = min(split, key=lambda cost: cost.edge_memory)
        return (
            f"No mode fits the edge's {size(memory_bytes)}: {least.mode} needs the least, {size(least.edge_memory)}, "
            "so use a smaller batch or fewer edge layers."
        )
    keeping = [cost for cost in choices if MODE_LEAKS[cost.mode].keeps(limits)]
    if not keeping:
        return (
            f"No mode that fits the edge keeps {_budget(limits)}: raise the budget, or give the edge the memory of an "
            "emulator."
        )
    chosen, beside = _RULES[goal](keeping)
    text = f"Use {chosen.mode}: {_figures(chosen, positions)}"
    return f"{text}; {beside}." if beside else f"{text}."


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
    only = f": {kept[0].mode} only" if len(kept) == 1 else ""
    lines = [f"Leak budget {_budget(limits)}{only}. What attacks are taken to recover (without a defence):"]
    lines += [f"{_named(leak)} {'keeps' if leak in kept else 'breaks'} it: {leak.why()}" for leak in leaks]
    return [
        *lines,
        "These bounds are assumed from what each mode sends, and nothing was attacked. A label that is a token of the "
        "text is sent as one, unless --withhold-answers keeps it back. `isthmus edge train --leak-budget` measures a "
        "run with its own texts and defence.",
    ]


def assumptions(settings: PlanSettings, link: LinkSpec, edge: SpeedProfile, cloud: SpeedProfile) -> list[str]:
    """What the figures rest on, a line each."""
    lines = [
        f"A step is one micro-batch of {settings.batch} x {settings.length} positions; edge and cloud take turns.",
        f"Edge: measured at {_conditions(edge)}. Cloud: {'the same' if cloud is edge else _conditions(cloud)}.",
        f"LoRA of rank {settings.rank}; kill_revive leaves {settings.live_share:.0%} of the sites' traffic on average "
        f"over a run; taps has {settings.taps} taps of {_width(settings)}; emulator keeps "
        f"{settings.emulator_keep:.0%} of the cloud's layers.",
        f"tail_cache and taps are given for epochs after the first; tail_cache is for the plan 0:{settings.plan.top}.",
        f"In the guides {', '.join(_renamed())}.",
        "Bytes are of whole sealed frames; gRPC, HTTP/2, TCP and TLS add about 1 %. What a session says once (its "
        "handshake, its list of sites) is not counted.",
        "Memory counts the process, weights, adapters with their optimizer, what autograd keeps and three tensors of "
        "logits; allocators need more.",
    ]
    if link.text != LOCAL:
        lines.append("The link's rate holds in either direction and from the first byte: no loss, no slow start.")
    return lines


def table(costs: Sequence[ModeCost], positions: int) -> Table:
    """The modes for a person."""
    result = Table(box=None, pad_edge=False)
    for name in ("mode", "s/step", "up", "down", "bytes/token", "trips", "edge memory", "edge GFLOPs", "edge share"):
        result.add_column(name, justify="left" if name == "mode" else "right")
    for cost in costs:
        if cost.first_epoch is not None:
            result.add_row(f"{cost.mode}, first epoch", *_cells(cost, cost.first_epoch, positions))
        result.add_row(cost.mode, *_cells(cost, cost.step, positions))
    return result


def _row(cost: ModeCost, positions: int) -> dict[str, Any]:
    step, first, leak = cost.step, cost.first_epoch, MODE_LEAKS.get(cost.mode)
    row: dict[str, Any] = {"mode": cost.mode, "trains_inside": cost.mode in TRAINS_INSIDE, "step_s": step.seconds}
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


def _cells(cost: ModeCost, step: StepCost, positions: int) -> list[str]:
    share = step.edge.flops / (step.edge.flops + step.cloud.flops)
    return [
        f"{step.seconds:.3g}",
        size(step.traffic.up),
        size(step.traffic.down),
        f"{step.traffic.total / positions:,.0f}",
        f"{step.traffic.round_trips:g}",
        size(cost.edge_memory),
        f"{step.edge.flops / 1e9:,.0f}",
        f"{share:.0%}",
    ]


def _figures(cost: ModeCost, positions: int) -> str:
    text = f"{_time(cost.step)} per step"
    if cost.first_epoch is not None:
        return (
            f"{text} after the first epoch, which takes {_time(cost.first_epoch)} and "
            f"{size(cost.first_epoch.traffic.total / positions)} per token"
        )
    if not cost.step.traffic.total:
        return f"{text}, and nothing crosses the link"
    return f"{text}, {size(cost.step.traffic.total / positions)} per token"


def _time(step: StepCost) -> str:
    return f"{step.seconds:.2g} s" if step.seconds < 10 else f"{step.seconds:.0f} s"


def _seconds(cost: ModeCost) -> float:
    return cost.step.seconds


def _for_quality(choices: Sequence[ModeCost]) -> tuple[ModeCost, str]:
    inside = [cost for cost in choices if cost.mode in TRAINS_INSIDE]
    if not inside:
        return min(choices, key=_seconds), "nothing that trains inside the cloud's layers fits the edge's memory"
    exact = next((cost for cost in inside if cost.mode == "edge"), None)
    others = [cost for cost in inside if cost is not exact]
    if exact is None or not others:
        return min(inside, key=_seconds), ""
    quickest = min(others, key=_seconds)
    if _seconds(exact) <= TOLERATED * _seconds(quickest):
        return exact, f"{quickest.mode} would take {_time(quickest.step)}"
    return quickest, f"edge sites everywhere would take {_time(exact.step)} over this link"


def _for_speed(choices: Sequence[ModeCost]) -> tuple[ModeCost, str]:
    chosen = min(choices, key=_seconds)
    inside = [cost for cost in choices if cost.mode in TRAINS_INSIDE and cost is not chosen]
    if not inside or chosen.mode in TRAINS_INSIDE:
        return chosen, ""
    quickest = min(inside, key=_seconds)
    return chosen, f"to train inside the cloud's layers, {quickest.mode} takes {_time(quickest.step)}"


def _for_privacy(choices: Sequence[ModeCost]) -> tuple[ModeCost, str]:
    chosen = min(choices, key=_seconds)
    if len(choices) == 1:
        return chosen, "no other mode keeps the leak budget"
    others = " and ".join(cost.mode for cost in choices if cost is not chosen)
    return chosen, f"the leak budget is kept by {others}, too"


def _renamed() -> list[str]:
    return [f"{leak.mode} is {leak.title}" for leak in MODE_LEAKS.values() if leak.mode != leak.title]


def _named(leak: ModeLeak) -> str:
    return leak.mode if leak.mode == leak.title else f"{leak.mode} ({leak.title})"


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
