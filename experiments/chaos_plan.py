"""Which fault falls next, and what the figures of `isthmus bench chaos` are made of. Pure: nothing is broken here."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from isthmus.backbone.errors import ConfigError
from isthmus.cloud.fault_points import POINTS, Point
from isthmus.experiments.delay_relay import Conditions
from isthmus.experiments.hostile import DEEDS

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
    "cloud_killed",
    "edge_killed",
    "connection_cut",
    *NETWORK,
    "silence",
    *DEEDS,
)
NEED_NAMESPACES: Final = (*NETWORK, "silence")
NOBODY_FEELS: Final = tuple(deed for deed in DEEDS if deed != "stash_evicted")
"""Nobody is to be hit by these, so that there is nothing to recover from."""

PATIENT = 0.75  # how often a fault is recovered from before the next one may fall
MEAN_GAP_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Fall:
    """The next fault.

    Attributes:
        kind: of `KINDS`.
        gap_s: seconds to wait before it.
        recovered: whether whatever fell before must have been recovered from.
        point: where a worker fails or stands still.
        victim: number of the tenant that is hit, where it is a single one.
        seed: of what the fault itself draws.
    """

    kind: str
    gap_s: float
    recovered: bool
    point: Point
    victim: int
    seed: int


class ChaosPlan:
    """Draws faults: each kind once in a random order, then again in another one.

    Args:
        kinds: of `KINDS`.
        tenants: how many there are.
        seed: of all draws.

    Raises:
        ConfigError: there is no such kind, or none at all.
    """

    def __init__(self, kinds: Sequence[str], tenants: int, seed: int) -> None:
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds:
            raise ConfigError(f"there is no fault {unknown[0] if unknown else ''!r}: choose of {', '.join(KINDS)}")
        self._kinds = tuple(kinds)
        self._tenants = tenants
        self._draw = random.Random(seed)  # noqa: S311 - no secret
        self._left: list[str] = []

    def next(self) -> Fall:
        """The fault that falls next."""
        if not self._left:
            self._left = self._draw.sample(self._kinds, len(self._kinds))
        draw = self._draw
        return Fall(
            self._left.pop(),
            draw.expovariate(1 / MEAN_GAP_SECONDS),
            draw.random() < PATIENT,
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

    Args:
        lives: points (x, y) of each series.

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
