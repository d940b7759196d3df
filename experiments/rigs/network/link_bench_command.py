"""The command `isthmus bench link`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from isthmus.common.readable import lines


def link(
    rate: Annotated[str, typer.Option(help="Of the way in each direction: 100mbit, 1gbit, …")] = "100mbit",
    rtt: Annotated[str, typer.Option(help="Round trip of the way: 50ms, 1.5s, …")] = "50ms",
    model: Annotated[
        str, typer.Option(help="A name (smollm2-135m), a local folder, a GGUF file or a hub id.")
    ] = "smollm2-135m",
    edge_layers: Annotated[
        str, typer.Option(help="How many of the first and of the last layers the edge holds.")
    ] = "2:2",
    codec: Annotated[str, typer.Option(help="Codec of the wire.")] = "fp32",
    cloud_dtype: Annotated[str, typer.Option(help="What the cloud computes in: fp32 or bf16.")] = "fp32",
    batch: Annotated[int, typer.Option(min=1, help="Sequences per micro-batch.")] = 2,
    seq: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 128,
    micro_batches: Annotated[int, typer.Option(min=2, help="Micro-batches per optimizer step.")] = 4,
    overlap: Annotated[int, typer.Option(min=2, help="Micro-batches in flight in the run with overlap.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps that count, of each run.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="torch threads on either side.")] = 1,
    keep: Annotated[
        Path | None, typer.Option(help="Folder for the run's files; by default they are gone afterwards.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train across a slow and long link, with and without overlap, and compare with what computing and wire need.

    The edge and the cloud run in network namespaces of their own, which needs root.

    Example: isthmus bench link --rate 100mbit --rtt 50ms --json
    """
    from isthmus.experiments.harness.launch import working_folder
    from isthmus.experiments.rigs.network.link_bench import LinkSettings, run_link
    from isthmus.planner.link_spec import parse_rate, parse_seconds

    settings = LinkSettings(
        model, parse_rate(rate), parse_seconds(rtt), edge_layers, codec, cloud_dtype, batch, seq, micro_batches,
        overlap, steps, threads,
    )  # fmt: skip
    with working_folder(keep) as folder:
        result = run_link(settings, folder)
    if as_json:
        typer.echo(json.dumps(result))
        return
    for line in lines(result, 32):
        typer.echo(line)
