"""The command `isthmus bench chaos`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from isthmus.common.readable import lines
from isthmus.experiments.harness.bench_flags import names_of, to_its_end


def chaos(
    seconds: Annotated[float, typer.Option(min=1, help="During which faults fall.")] = 600.0,
    model: Annotated[
        str, typer.Option(help="A name (smollm2-135m), a local folder, a GGUF file or a hub id.")
    ] = "smollm2-135m",
    edge_layers: Annotated[
        str, typer.Option(help="How many of the first and of the last layers the edge holds.")
    ] = "2:2",
    tenants: Annotated[int, typer.Option(min=1, help="That train at the same time.")] = 3,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Of the cloud, about 1 GB each of smollm2-135m; 2, or 1 in a soak.")
    ] = None,
    steps: Annotated[int, typer.Option(min=4, help="Optimizer steps of a training.")] = 30,
    batch: Annotated[int, typer.Option(min=1, help="Examples per step.")] = 1,
    seq: Annotated[int, typer.Option(min=32, help="Tokens per example at most.")] = 64,
    kinds: Annotated[str, typer.Option(help="Faults, comma-separated; by default all that the machine can make.")] = "",
    seed: Annotated[int, typer.Option(help="Of the faults.")] = 0,
    silence: Annotated[float, typer.Option(min=0.1, help="Seconds for which the way carries nothing.")] = 30.0,
    stash_bytes: Annotated[str, typer.Option(help="The cloud's budget for forward states.")] = "1GiB",
    warm_up: Annotated[
        float | None,
        typer.Option(min=0, help="Of a worker's life, whose memory does not count; 15, or a quarter of a soak."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="torch threads on either side.")] = 1,
    soak: Annotated[bool, typer.Option("--soak", help="Break nothing: tenants come and go.")] = False,
    keep: Annotated[
        Path | None, typer.Option(help="Folder for the run's files; by default they are gone afterwards.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Let several tenants train while workers, controller, cluster, edges, connections and the network break at random.

    Each tenant's adapter is compared, bit for bit, with that of its undisturbed training. `felt` says how much longer
    the tenants' steps take while somebody misbehaves. Faults of the network need root, for network namespaces; without
    it the others fall.

    Example: isthmus bench chaos --seconds 600 --json

    Memory alone: isthmus bench chaos --soak --seconds 1800 --json
    """
    from isthmus.experiments.harness.launch import working_folder
    from isthmus.experiments.rigs.chaos.chaos_bench import ChaosSettings, run_chaos
    from isthmus.experiments.rigs.chaos.chaos_plan import KINDS
    from isthmus.protocol.enrolment import parse_size

    if warm_up is None:
        warm_up = seconds / 4 if soak else 15.0
    if workers is None:
        workers = 1 if soak else 2
    settings = ChaosSettings(
        model,
        edge_layers,
        tenants,
        workers,
        seconds,
        steps,
        batch,
        seq,
        names_of(kinds, "kinds") if kinds else KINDS,
        seed,
        silence_s=silence,
        stash_bytes=parse_size(stash_bytes),
        warm_up_s=warm_up,
        threads=threads,
        soak=soak,
    )

    def work() -> object:
        with working_folder(keep) as folder:
            return run_chaos(settings, folder)

    result = to_its_end(work)
    if as_json:
        typer.echo(json.dumps(result))
        return
    for line in lines(result, 32):
        typer.echo(line)
