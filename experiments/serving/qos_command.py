"""The command `isthmus bench qos`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from isthmus.common.cores import usable_cores
from isthmus.experiments.harness.bench_flags import numbers_of, to_its_end


def qos(
    model: Annotated[
        str, typer.Option(help="A name (smollm2-135m), a local folder, a GGUF file or a hub id.")
    ] = "smollm2-135m",
    edge_layers: Annotated[
        str, typer.Option(help="How many of the first and of the last layers the edge holds.")
    ] = "2:2",
    loads: Annotated[
        str, typer.Option(help="Computing time that is asked for over the time there is, comma-separated.")
    ] = "0.4,0.8,1.0,1.2",
    seconds: Annotated[float, typer.Option(min=1, help="For which calls arrive, in each run.")] = 15.0,
    interactive_share: Annotated[float, typer.Option(help="Of the arrivals; the others are training.")] = 0.5,
    interactive_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an interactive call.")] = 32,
    training_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a training call.")] = 64,
    deadline: Annotated[float, typer.Option(min=0.01, help="Of interactive calls, in seconds.")] = 1.0,
    tenants: Annotated[int, typer.Option(min=1, help="Among whom the calls are drawn.")] = 8,
    threads: Annotated[
        int | None, typer.Option(min=1, help="torch threads; by default all cores that it may use.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the arrivals.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="How often both schedulers have their turn.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the scheduler with the former one: latency and deadlines of interactive calls, throughput.

    Example: isthmus bench qos --json
    """
    from isthmus.experiments.serving.qos_bench import QosSettings, run_qos

    settings = QosSettings(
        model, edge_layers, numbers_of(loads, "loads"), seconds, interactive_share, interactive_tokens,
        training_tokens, deadline, tenants, threads or usable_cores(), seed, rounds,
    )  # fmt: skip
    result = to_its_end(lambda: run_qos(settings))
    if as_json:
        typer.echo(json.dumps(result))
        return
    for row in result["runs"]:
        p50, p99 = (f"{row[name]:.3f}" if row[name] is not None else "-" for name in ("p50_s", "p99_s"))
        typer.echo(
            f"{row['arrivals']:8} load {row['load']:4.2f}  {row['policy']:9}  {row['throughput']:7.0f} positions/s   "
            f"interactive: median {p50} s, 99 % within {p99} s, missed {row['missed']:.1%}"
        )
