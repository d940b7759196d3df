"""The command `isthmus bench scheduler`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from isthmus.common.cores import usable_cores
from isthmus.experiments.harness.bench_flags import numbers_of, to_its_end


def scheduler(
    seeds: Annotated[int, typer.Option(min=2, help="Simulations of each scene.")] = 5,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each edge, in the simulation and in real runs.")] = 24,
    loads: Annotated[
        str, typer.Option(help="Computing time that is asked for over the time there is, comma-separated.")
    ] = "0.4,0.8,1.2,1.6",
    seconds: Annotated[float, typer.Option(min=1, help="Simulated seconds for which calls arrive.")] = 60.0,
    deadline: Annotated[float, typer.Option(min=0.01, help="Of interactive calls, in seconds.")] = 1.0,
    real: Annotated[
        bool, typer.Option("--real", help="Run `bench tenants` for the rows that it can measure; on a quiet machine.")
    ] = False,
    model: Annotated[
        str, typer.Option(help="Of real runs: a name (smollm2-135m), a local folder, a GGUF file or a hub id.")
    ] = "smollm2-135m",
    edge_layers: Annotated[
        str, typer.Option(help="Of real runs: how many of the first and of the last layers the edge holds.")
    ] = "2:2",
    n: Annotated[int, typer.Option("--n", min=2, help="Tenants of real runs.")] = 8,
    threads: Annotated[
        int | None, typer.Option(min=1, help="torch threads of real runs' cloud; by default all cores.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """See what each mechanism of the scheduler is worth: a table of schedulers over the same simulated arrivals.

    Example: isthmus bench scheduler
    """
    from isthmus.experiments.harness.launch import working_folder
    from isthmus.experiments.serving.scheduler_bench import SchedulerSettings, run_scheduler
    from isthmus.experiments.serving.tenants_crowd import TenantSettings

    tenants = TenantSettings(model, n, edge_layers=edge_layers, steps=steps, threads=threads or usable_cores())
    settings = SchedulerSettings(seeds, steps, numbers_of(loads, "loads"), seconds, deadline, tenants if real else None)
    with working_folder() as folder:
        result = to_its_end(lambda: run_scheduler(settings, folder))
    if as_json:
        typer.echo(json.dumps(result))
        return
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
    if "graph_counting" in result:
        typer.echo(f"counting the bytes of every graph: passes take {result['graph_counting']:.3f} x")


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3f}"
