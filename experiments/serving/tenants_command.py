"""The command `isthmus bench tenants`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from isthmus.common.machine import usable_cores
from isthmus.common.readable import lines
from isthmus.experiments.harness.bench_flags import to_its_end


def tenants(
    n: Annotated[int, typer.Option("--n", min=2, help="Tenants.")] = 8,
    model: Annotated[
        str, typer.Option(help="A name (smollm2-135m), a local folder, a GGUF file or a hub id.")
    ] = "smollm2-135m",
    tokens: Annotated[int, typer.Option(min=16, help="Tokens of a tenant's step, on average.")] = 64,
    edge_layers: Annotated[
        str, typer.Option(help="How many of the first and of the last layers the edge holds.")
    ] = "2:2",
    steps: Annotated[int, typer.Option(min=2, help="Steps of each tenant that count.")] = 24,
    threads: Annotated[
        int | None, typer.Option(min=1, help="torch threads of the cloud; by default all cores that it may use.")
    ] = None,
    batching: Annotated[
        Literal["on", "off"], typer.Option(help="Whether the cloud computes several tenants' calls in one pass.")
    ] = "on",
    figure: Annotated[
        Path | None, typer.Option(help="PNG of the throughput against the number of tenants; measures 1, 2, 4 … too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare many edges on one cloud with as many single processes: throughput, memory, fairness, losses.

    Example: isthmus bench tenants --n 8 --json
    """
    from isthmus.experiments.harness.launch import working_folder
    from isthmus.experiments.serving.tenants_bench import draw_growth, run_tenants
    from isthmus.experiments.serving.tenants_crowd import TenantSettings

    counts = sorted({n, *(2**power for power in range(n.bit_length()) if 2**power <= n)}) if figure else ()
    threads = threads or usable_cores()
    settings = TenantSettings(model, n, tokens, edge_layers, steps, threads, batching == "on", tuple(counts))
    with working_folder() as folder:
        result = to_its_end(lambda: run_tenants(settings, folder))
        if figure is not None:
            draw_growth(result["growth"], figure)
    if as_json:
        typer.echo(json.dumps(result))
        return
    for line in lines(result, 32):
        typer.echo(line)
