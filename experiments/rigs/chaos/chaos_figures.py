"""What a run of `isthmus bench chaos` has seen, and what is printed of it."""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from isthmus.common.errors import IsthmusError
from isthmus.experiments.rigs.chaos.chaos_plan import Span, percentile_95, pooled_slope, slowdown, warmed_up
from isthmus.experiments.rigs.chaos.chaos_tenant import Tenant

SAMPLE_SECONDS = 0.5
SOAK_WINDOW = 0.1  # share of the time, after the warm-up and at the end, over which resident size is a median

Life = Sequence[tuple[float, float]]
"""Of a process: (second, resident bytes)."""


@dataclass(frozen=True, slots=True)
class Fallen:
    """A fault that fell.

    Attributes:
        recovery_s: Until the last tenant that was at a step went on; None where it hit nobody, as it was to or not.
    """

    kind: str
    recovery_s: float | None


class WorkerMemory:
    """Looks at the workers' resident sizes now and then, from a thread of its own; a context manager.

    Args:
        pids: finds the processes of the workers that answer.
        workers: how many there are when all do.
    """

    def __init__(self, pids: Callable[[], Sequence[int]], workers: int) -> None:
        self.lives: dict[int, list[tuple[float, float]]] = {}  # (seconds, bytes) by process
        self._pids = pids
        self._workers = workers
        self._begun = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="memory", daemon=True)

    def mark(self) -> None:
        """What was seen until now belongs to the trainings that nobody disturbs."""
        self._begun = time.monotonic()

    def since_mark(self) -> list[list[tuple[float, float]]]:
        """The points of each life since then."""
        lives = ([point for point in life if point[0] >= self._begun] for life in self.lives.values())
        return [life for life in lives if life]

    def __enter__(self) -> WorkerMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        pids: set[int] = set()
        while not self._ended.wait(SAMPLE_SECONDS):
            for pid in tuple(pids):
                size = resident_bytes(pid)
                if size is None:
                    pids.remove(pid)
                else:
                    self.lives.setdefault(pid, []).append((time.monotonic(), float(size)))
            if len(pids) < self._workers:
                pids.update(self._pids())


def resident_bytes(pid: int) -> int | None:
    """A process's resident size; None where it has ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss) or None
    except psutil.NoSuchProcess:
        return None


def figures(
    faults: Sequence[Fallen],
    tenants: Sequence[Tenant],
    calm: Sequence[Span],
    deeds: Mapping[str, Sequence[Span]],
    memory: WorkerMemory,
    *,
    workers: int,
    warm_up_s: float,
    soak: bool,
) -> dict[str, Any]:
    """What is printed.

    `recovery_p95_s`: over the faults that have hit somebody; from the fault to the moment when the last of the tenants
        that were at a step has finished one for which the cloud has answered since.
    `felt`: the slowdown of the others (`chaos_plan.slowdown`) during each deed of the hostile tenant; of
        `further_tenant`, which is no fault, that by one more tenant that behaves.
    `rss_slope_bytes_per_s`: one slope, by least squares, of a worker's resident size over time, with an intercept for
        each life of each worker's process; the first `warm_up_s` of each do not count. None where no life was longer.
    """
    rounds = [one for tenant in tenants for one in tenant.rounds]
    recovered = [fault.recovery_s for fault in faults if fault.recovery_s is not None]
    by_kind = {
        kind: [fault.recovery_s for fault in faults if fault.kind == kind and fault.recovery_s is not None]
        for kind in sorted({fault.kind for fault in faults if fault.recovery_s is not None})
    }
    lives = memory.since_mark()
    counted = [warmed_up(life, warm_up_s) for life in lives]
    slope = pooled_slope(counted)
    steps = [tenant.steps for tenant in tenants]
    ratios = {deed: slowdown(steps, calm, spans) for deed, spans in sorted(deeds.items())}
    found = {
        "faults": len(faults),
        "faults_by_kind": dict(sorted(Counter(fault.kind for fault in faults).items())),
        "trainings": len(rounds),
        "steps_finished": sum(len(tenant.finished) for tenant in tenants),
        "steps_lost": sum(one["steps_lost"] for one in rounds),
        "steps_doubled": sum(one["steps_doubled"] for one in rounds),
        "adapters_identical": bool(rounds) and all(one["adapter_identical"] for one in rounds),
        "losses_identical": bool(rounds) and all(one["losses_identical"] for one in rounds),
        "retries": sum(tenant.retries for tenant in tenants),
        "recovery_p95_s": percentile_95(recovered),
        "recovery_s_by_kind": {kind: round(statistics.median(seconds), 2) for kind, seconds in by_kind.items()},
        "felt": {deed: None if ratio is None else round(ratio, 2) for deed, ratio in ratios.items()},
        "rss_slope_bytes_per_s": None if slope is None else round(slope),
        "rss_lives": len(lives),
        "rss_seconds": round(sum(life[-1][0] - life[0][0] for life in counted if life), 1),
        "rss_most_bytes": round(max((size for life in lives for _, size in life), default=0)),
    }
    return {**found, **soaked(counted, workers)} if soak else found


def soaked(lives: Sequence[Life], workers: int) -> dict[str, Any]:
    """Resident size of all workers after the warm-up and at the end, a median over `SOAK_WINDOW` of the time for each.

    Raises IsthmusError where a worker did not live through it, or not for longer than the warm-up.
    """
    if len(lives) != workers or not all(lives):
        raise IsthmusError(
            f"a soak is one life of each of {workers} workers, longer than its warm-up, and not {len(lives)} lives of "
            f"{[len(life) for life in lives]} points: give more --seconds, and look into worker.log if one died"
        )
    before = after = 0.0
    for life in lives:
        window = SOAK_WINDOW * (life[-1][0] - life[0][0])
        before += statistics.median(size for moment, size in life if moment <= life[0][0] + window)
        after += statistics.median(size for moment, size in life if moment >= life[-1][0] - window)
    return {"rss_after_warm_up_bytes": round(before), "rss_end_bytes": round(after), "rss_growth": after / before}
