"""What each mechanism of the scheduler is worth: a table of schedulers over the same simulated arrivals.

Three scenes, each with several seeds: eight edges that train in a closed loop, alone and beside a tenant that floods;
two and four such edges; and interactive and training calls that come by themselves (Poisson and in bursts), with
deadlines, whoever is still being served. With `real`, the options of `isthmus cloud serve` that switch a mechanism off
are run by `isthmus bench tenants` as well, which takes a machine that does nothing else.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import typer

from isthmus.cloud.engine.requests import Kind
from isthmus.cloud.session.handler import BACKWARD, FORWARD, KEPT_FORWARD
from isthmus.common.machine import usable_cores
from isthmus.experiments.harness.bench_flags import numbers_of
from isthmus.experiments.harness.bench_settings import SchedulerSettings, TenantSettings
from isthmus.experiments.harness.launch import stderr_progress
from isthmus.experiments.serving.qos_bench import ARRIVALS, gap
from isthmus.experiments.serving.scheduler_policies import POLICIES, Policy
from isthmus.experiments.serving.simulated_cloud import (
    OWN_SECONDS,
    PASS_SECONDS,
    POSITION_SECONDS,
    STATE_ROOM,
    SimulatedCloud,
)
from isthmus.experiments.serving.tenants_bench import jain, run_tenants
from isthmus.experiments.serving.tenants_crowd import LENGTHS, percentile

TOKENS: Final = 64
CORES: Final = 2
FLOODS: Final[Mapping[str, tuple[int, tuple[Kind, ...], int]]] = {
    "ten sessions that train": (10, (KEPT_FORWARD, BACKWARD), 0),
    "ten that only replay": (10, (BACKWARD,), 0),
    "ten that never call backward": (10, (KEPT_FORWARD,), 0),
    "one that never calls backward": (1, (KEPT_FORWARD,), 0),
    "one that replays, nine that hold states": (1, (BACKWARD,), 9),
}
"""Sessions that want computing all the time, the kinds of their calls, and sessions that hold a forward state."""
INTERACTIVE_TOKENS: Final = 32
REAL_OPTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "shipped": (),
    "shipped, no waiting for partners": ("--max-wait", "0"),
    "shipped, one compute thread": ("--compute-threads", "1"),
    "shipped, no limit of states": ("--state-bytes", "1024GiB"),
    "shipped, every graph counted": ("--count-graphs",),
    "shipped, heap not trimmed": ("--no-trim-heap",),
}
"""Rows that `isthmus bench tenants` can measure, by the options of `isthmus cloud serve`."""
SIMULATED: Final[Mapping[str, str]] = {
    "/ bound": "throughput_over_bound",
    "spread": "spread",
    "2 edges": "throughput_of_2_over_bound",
    "4 edges": "throughput_of_4_over_bound",
    "Jain": "jain",
    "states": "state_share",
    "flood": "flood_p99_ratio",
    "missed": "missed",
    "p99 s": "p99_s",
    "tokens/s": "positions_per_s",
}
REAL: Final[Mapping[str, str]] = {
    "ratio": "throughput_ratio",
    "/ bound": "throughput_over_bound",
    "growth": "cloud_growth_share",
    "flood": "flood_p99_ratio",
    "Jain": "jain",
}
"""Columns of the two tables: their titles, and the figures' names."""


def run_scheduler(settings: SchedulerSettings, folder: Path) -> dict[str, Any]:
    """Simulate, and measure where `real` asks for it; see the module.

    Returns:
        `rows`, each with a `policy` and, for the closed loop, `throughput_over_bound` of eight edges (all their calls
        in one pass, and no core idle), its `spread` (standard deviation over the seeds), that of two and of four edges,
        `jain` (the least), `state_share` (the most forward states held at a time, over the span's weights), and
        `flood_p99_ratio` of the worst flood (see `tenants_bench`), which is `flood`; for calls that come by themselves,
        the means over the loads of `missed`, `p99_s` and `positions_per_s`. `real` is what `tenants_bench` returns, for
        the rows that it can measure.
    """
    rows = []
    with stderr_progress("schedulers", len(POLICIES)) as advance:
        for policy in POLICIES:
            rows.append({"policy": policy.name, **closed_loop(policy, settings), **open_loop(policy, settings)})
            advance()
    result: dict[str, Any] = {
        "rows": rows,
        **{name: getattr(settings, name) for name in ("seeds", "steps", "seconds", "deadline")},
        "loads": numbers_of(settings.loads, "loads"),
    }
    if settings.real:
        threads = settings.threads or usable_cores()
        tenants = TenantSettings(
            settings.n, settings.model, edge_layers=settings.edge_layers, steps=settings.steps, threads=threads
        )
        result["real"] = {
            name: run_tenants(replace(tenants, cloud_options=options), folder / f"{number}")
            for number, (name, options) in enumerate(REAL_OPTIONS.items())
        }
    return result


def show(result: dict[str, Any]) -> None:
    """Print the tables that stand in docs/scheduler.md: of the simulations, and of the real runs."""
    _print_table(SIMULATED, {row["policy"]: row for row in result["rows"]})
    if "real" in result:
        typer.echo()
        _print_table(REAL, result["real"])


def _print_table(columns: Mapping[str, str], rows: Mapping[str, Mapping[str, Any]]) -> None:
    typer.echo(f"| scheduler | {' | '.join(columns)} |")
    typer.echo(f"|---|{'---|' * len(columns)}")
    for name, row in rows.items():
        typer.echo(f"| {name} | {' | '.join(_cell(row[key]) for key in columns.values())} |")


def _cell(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3f}"


def closed_loop(policy: Policy, settings: SchedulerSettings) -> dict[str, Any]:
    """Edges that train, each call after the last one's answer."""
    clouds = [_crowd(policy, seed, settings.steps) for seed in range(settings.seeds)]
    ratios = [_over_bound(cloud) for cloud in clouds]
    few = {
        f"throughput_of_{n}_over_bound": statistics.mean(
            _over_bound(_crowd(policy, seed, settings.steps, range(n))) for seed in range(settings.seeds)
        )
        for n in (2, 4)
    }
    calm = _p99(clouds, settings.steps)
    floods = {
        name: _p99(
            [_crowd(policy, seed, settings.steps, flood=flood) for seed in range(settings.seeds)], settings.steps
        )
        / calm
        for name, flood in FLOODS.items()
    }
    worst = max(floods, key=lambda name: floods[name])
    return {
        "throughput_over_bound": statistics.mean(ratios),
        "spread": statistics.stdev(ratios),
        **few,
        "jain": min(jain([len(began) for began in cloud.began.values()]) for cloud in clouds),
        "state_share": max(cloud.most_state for cloud in clouds) / (2 * STATE_ROOM),
        "flood_p99_ratio": floods[worst],
        "flood": worst,
    }


def open_loop(policy: Policy, settings: SchedulerSettings) -> dict[str, float]:
    """Calls that come by themselves: the means over arrivals, loads and seeds."""
    scenes = [
        _arrivals(policy, settings, kind, load, seed)
        for kind in ARRIVALS
        for load in numbers_of(settings.loads, "loads")
        for seed in range(settings.seeds)
    ]
    return {name: statistics.mean(scene[name] for scene in scenes) for name in ("missed", "p99_s", "positions_per_s")}


def _crowd(
    policy: Policy,
    seed: int,
    steps: int,
    tenants: Sequence[int] = range(len(LENGTHS)),
    flood: tuple[int, tuple[Kind, ...], int] | None = None,
) -> SimulatedCloud:
    """Edges that train, of which the first floods where there is a `flood`."""
    cloud = SimulatedCloud(seed, policy.scheduler(), policy.limits.compute_threads, CORES)
    for number in tenants:
        if number or flood is None:
            cloud.train(f"tenant {number}", round(TOKENS * LENGTHS[number]))
    if flood is not None:
        sessions, kinds, held = flood
        for session in range(sessions):
            cloud.flood("tenant 0", session, TOKENS, kinds)
        for session in range(sessions, sessions + held):
            cloud.hold("tenant 0", session, TOKENS)
    cloud.run_steps(steps)
    return cloud


def _over_bound(cloud: SimulatedCloud) -> float:
    lengths = [round(TOKENS * LENGTHS[number]) for number in range(len(cloud.began))]
    best = (PASS_SECONDS + (OWN_SECONDS + POSITION_SECONDS) * sum(lengths)) / CORES  # seconds of a step of each
    done = sum((len(began) - 1) * length for began, length in zip(cloud.began.values(), lengths, strict=True))
    return best * done / sum(lengths) / cloud.now


def _p99(clouds: Sequence[SimulatedCloud], steps: int) -> float:
    return percentile([step for cloud in clouds for step in cloud.steps(steps)], 0.99) or 0.0


def _arrivals(policy: Policy, settings: SchedulerSettings, kind: str, load: float, seed: int) -> dict[str, float]:
    """Half of the calls are interactive; each is of a session of its own."""
    cloud = SimulatedCloud(seed, policy.scheduler(), policy.limits.compute_threads, CORES)
    draw = random.Random(seed)  # noqa: S311  # a simulation
    interactive = (PASS_SECONDS + POSITION_SECONDS * INTERACTIVE_TOKENS) / 3
    rate = load * CORES / statistics.mean((interactive, PASS_SECONDS + POSITION_SECONDS * TOKENS))
    latencies: list[float] = []
    positions, asked, at = 0, 0, 0.0

    def count(more: int) -> None:
        nonlocal positions
        positions += more

    def chat(number: int) -> None:
        nonlocal asked
        asked += 1
        came = cloud.now

        def done() -> None:
            latencies.append(cloud.now - came)
            count(INTERACTIVE_TOKENS)

        tenant = f"tenant {draw.randrange(len(LENGTHS))}"
        cloud.call(tenant, number, INTERACTIVE_TOKENS, FORWARD, done, deadline=settings.deadline)

    def train(number: int) -> None:
        tenant = f"tenant {draw.randrange(len(LENGTHS))}"

        def backward() -> None:
            count(TOKENS)
            cloud.call(tenant, number, TOKENS, BACKWARD, lambda: count(TOKENS))

        cloud.call(tenant, number, TOKENS, KEPT_FORWARD, backward)

    number = 0
    while (at := at + gap(draw, kind, rate)) < settings.seconds:
        cloud.run_until(at)
        number += 1
        (chat if draw.random() < 0.5 else train)(number)
    cloud.run_until(settings.seconds)
    in_time = sum(seconds <= settings.deadline for seconds in latencies)
    return {
        "missed": 1 - in_time / max(1, asked),
        "p99_s": percentile(latencies, 0.99) or 0.0,
        "positions_per_s": positions / settings.seconds,
    }
