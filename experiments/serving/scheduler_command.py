"""What `isthmus bench scheduler` measures, from the flags, and how it is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from isthmus.common.machine import usable_cores
from isthmus.experiments.harness.bench_flags import numbers_of
from isthmus.experiments.harness.bench_settings import SchedulerFlags
from isthmus.experiments.serving.scheduler_bench import SchedulerSettings, run_scheduler
from isthmus.experiments.serving.tenants_crowd import TenantSettings


def run(flags: SchedulerFlags, folder: Path) -> dict[str, Any]:
    """Simulate, and measure if asked to. Raises ConfigError where the flags leave nothing to compare."""
    tenants = TenantSettings(
        flags.model,
        flags.n,
        edge_layers=flags.edge_layers,
        steps=flags.steps,
        threads=flags.threads or usable_cores(),
    )
    loads = numbers_of(flags.loads, "loads")
    settings = SchedulerSettings(
        flags.seeds, flags.steps, loads, flags.seconds, flags.deadline, tenants if flags.real else None
    )
    return run_scheduler(settings, folder)


def show(result: dict[str, Any]) -> None:
    """Print the table of schedulers, which stands in docs/scheduler.md."""
    measured = result.get("real", {})
    names = [*(row["policy"] for row in result["rows"]), *(set(measured) - {row["policy"] for row in result["rows"]})]
    rows = {row["policy"]: row for row in result["rows"]}
    titles = ("/ bound", "spread", "2 edges", "4 edges", "Jain", "states", "flood", "missed", "p99 s", "tokens/s")
    keys = (
        *("throughput_over_bound", "spread", "throughput_of_2_over_bound", "throughput_of_4_over_bound", "jain"),
        *("state_share", "flood_p99_ratio", "missed", "p99_s", "positions_per_s"),
    )
    real_keys = ("throughput_ratio", "throughput_over_bound", "cloud_growth_share", "flood_p99_ratio", "jain")
    real_titles = ("real ratio", "/ bound", "growth", "flood", "Jain")
    typer.echo(f"| scheduler | {' | '.join((*titles, *real_titles))} |")
    typer.echo(f"|---|{'---|' * (len(titles) + len(real_titles))}")
    for name in names:
        cells = [_cell(rows.get(name, {}).get(key)) for key in keys]
        cells += [_cell(measured.get(name, {}).get(key)) for key in real_keys]
        typer.echo(f"| {name} | {' | '.join(cells)} |")


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3f}"
