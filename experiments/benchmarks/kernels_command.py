"""The command `isthmus bench kernels`."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def kernels(
    rows: Annotated[list[int] | None, typer.Option(min=1, help="Rows of each group, repeatable.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each candidate.")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="torch threads.")] = 1,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; by default cuda where there is such a device.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the grouped low-rank product and block quantization with the calls of libraries for the same.

    Example: isthmus bench kernels --threads 2 --json
    """
    import torch

    from isthmus.common.errors import ConfigError
    from isthmus.experiments.benchmarks.kernels_bench import KernelSettings, run_kernels

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen not in ("cpu", "cuda"):
        raise ConfigError(f"there is no device {chosen!r} to measure on: choose cpu or cuda")
    sizes = tuple(rows or KernelSettings().rows)
    result = run_kernels(KernelSettings(rows=sizes, rounds=rounds, threads=threads, device=chosen))
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(f"on {chosen}, Triton {'on' if result['triton'] else 'off'}, {threads} threads; below 1 ours is faster")
    for row in result["grouped"]:
        others = ", ".join(
            f"{ratio:.2f} of {name}{'' if row['same_bits'].get(name, True) else ' (other bits)'}"
            for name, ratio in row["ratio"].items()
        )
        typer.echo(
            f"grouped {row['dtype']:8} {row['in']:4} -> {row['out']:4} {row['rows']:3} rows a group "
            f"{row['seconds'] * 1e3:7.2f} ms   {others}"
        )
    for row in result["blockwise"]:
        others = ", ".join(f"{ratio:.2f} of {name}" for name, ratio in row["ratio"].items())
        typer.echo(f"{row['call']:16} {row['rows']:5} x {row['width']:4} {row['seconds'] * 1e3:7.2f} ms   {others}")
