"""Which fault falls next, and what the figures of `isthmus bench chaos` are made of. Pure: nothing is broken here."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from isthmus.experiments.network.delay_relay import Conditions
from isthmus.experiments.rigs.fault_points.fault_points import POINTS, Point
from isthmus.experiments.rigs.hostile_tenants import DEEDS

AT_POINT: Final = {f"worker_killed_{point}": point for point in POINTS}
"""The worker dies when it next gets there."""

NETWORK: Final = {
    "packets_lost": Conditions(loss=0.03),
    "packets_late": Conditions(rtt_s=0.2),
    "packets_doubled": Conditions(duplicate=0.2),
    "packets_reordered": Conditions(reorder=0.2),
}
"""What a bad way does for a while."""

KINDS: Final = (
    *AT_POINT,
    "worker_killed",
    "worker_failed",
    "worker_stalled",
    "controller_killed",
    "control_store_killed",
    "cloud_killed",
    "edge_killed",
    "connection_cut",
    *NETWORK,
    "silence",
    *DEEDS,
)
"""What falls. Of the deeds, `CONTROL` is no fault, and not counted as one: read the others' slowdown beside its."""
NEED_NAMESPACES: Final = (*NETWORK, "silence")
HIT_NOBODY: Final = tuple(deed for deed in DEEDS if deed != "stash_evicted")
"""These may hit nobody, so there is nothing to recover from; the slowdown says whether that holds."""

Span = tuple[float, float]
"""The seconds at which something begins and ends."""

PATIENT = 0.75  # how often a fault is recovered from before the next one may fall
MEAN_GAP_SECONDS = 1.0
WARM_STEPS = 2


@dataclass(frozen=True, slots=True)
class Fall:
    """The next fault.

    Attributes:
        recovered: whether whatever fell before must have been recovered from; always where a tenant misbehaves, so that
            nothing else shows in the figures then.
        victim: number of the tenant that is hit, where it is a single one.
        seed: of what the fault itself draws, and of which worker it hits.
    """

    kind: str
    gap_s: float
    recovered: bool
    point: Point
    victim: int
    seed: int


class ChaosPlan:
    """Draws faults: each kind once in a random order, then again in another one."""

    def __init__(self, kinds: Sequence[str], tenants: int, seed: int) -> None:
        self._kinds = tuple(kinds)
        self._tenants = tenants
        self._draw = random.Random(seed)  # noqa: S311 - no secret
        self._left: list[str] = []

    def next(self) -> Fall:
        """The fault that falls next."""
        if not self._left:
            self._left = self._draw.sample(self._kinds, len(self._kinds))
        draw, kind = self._draw, self._left.pop()
        return Fall(
            kind,
            draw.expovariate(1 / MEAN_GAP_SECONDS),
            draw.random() < PATIENT or kind in DEEDS,
            draw.choice(POINTS),
            draw.randrange(self._tenants),
            draw.randrange(1 << 30),
        )


def percentile_95(values: Sequence[float]) -> float | None:
    """The 95th percentile, interpolated; None of nothing."""
    if len(values) < 2:
        return values[0] if values else None
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


def pooled_slope(lives: Iterable[Sequence[tuple[float, float]]]) -> float | None:
    """One slope by least squares for several series, each with an intercept of its own.

    Returns:
        The slope; None where no series has two different x.
    """
    covariance = variance = 0.0
    for life in lives:
        if len(life) < 2:
            continue
        middle = statistics.fmean(x for x, _ in life)
        level = statistics.fmean(y for _, y in life)
        covariance += sum((x - middle) * (y - level) for x, y in life)
        variance += sum((x - middle) ** 2 for x, _ in life)
    return covariance / variance if variance else None


def warmed_up(life: Sequence[tuple[float, float]], seconds: float) -> Sequence[tuple[float, float]]:
    """The points (time, value) of a life without its first `seconds`."""
    return [point for point in life if point[0] - life[0][0] >= seconds]


def common(tenants: Sequence[Sequence[Span]]) -> list[Span]:
    """The time in which all tenants make steps at once, without their first ones, which are slower. It may be none."""
    if not tenants or any(len(steps) <= WARM_STEPS for steps in tenants):
        return []
    begin, end = max(steps[WARM_STEPS][0] for steps in tenants), min(steps[-1][1] for steps in tenants)
    return [(begin, end)] if begin < end else []


def slowdown(tenants: Iterable[Sequence[Span]], calm: Sequence[Span], deeds: Sequence[Span]) -> float | None:
    """How much longer a step takes while somebody misbehaves: 1 where it takes no longer.

    Only the part of a step counts that lies in a deed: all these parts' seconds, over those that the same parts take in
    calm, as parts of the mean of the tenant's steps that lie wholly in calm times.

    Args:
        calm: when nothing fell and nobody misbehaved.
        deeds: when somebody misbehaved; they do not overlap.

    Returns:
        None where no tenant has made steps in both.
    """
    took = usual = 0.0
    for steps in tenants:
        peaceful = [end - begin for begin, end in steps if any(one <= begin and end <= other for one, other in calm)]
        if not peaceful:
            continue
        mean = statistics.fmean(peaceful)
        for begin, end in steps:
            within = sum(max(0.0, min(end, other) - max(begin, one)) for one, other in deeds)
            took += within
            usual += mean * within / (end - begin) if within else 0.0
    return took / usual if usual else None
