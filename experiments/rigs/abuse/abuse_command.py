"""The command `isthmus bench abuse`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.experiments.harness.bench_flags import names_of, to_its_end

if TYPE_CHECKING:
    from collections.abc import Callable


def abuse(
    model: Annotated[
        str, typer.Option(help="A name (smollm2-135m), a local folder, a GGUF file or a hub id.")
    ] = "smollm2-135m",
    edge_layers: Annotated[
        str, typer.Option(help="How many of the first and of the last layers the edge holds.")
    ] = "2:2",
    attacks: Annotated[str, typer.Option(help="Attacks, comma-separated; by default all.")] = "",
    seconds: Annotated[float, typer.Option(min=0.5, help="For which each attack on a worker goes on, twice.")] = 5.0,
    threads: Annotated[int, typer.Option(min=1, help="torch threads of the worker.")] = 1,
    keep: Annotated[
        Path | None, typer.Option(help="Folder for the run's files; by default they are gone afterwards.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Attack a cloud as strangers and tenants would, and an edge as a cloud would; hold the cost to fixed ceilings.

    Each attack on a worker is made alone, while its memory, descriptors and processor time are counted, and beside a
    tenant that behaves, whose latency is compared with its calm one. An attack on an edge must end with the error that
    the edge documents. Servers with planted weaknesses, and edges without a bound, are measured last: each must be
    caught. Exits with 1 where a ceiling is broken or a planted weakness is not caught.

    Example: isthmus bench abuse --json
    """
    from isthmus.experiments.harness.launch import stderr_progress, working_folder
    from isthmus.experiments.rigs.abuse.abuse_bench import ALL, AbuseSettings, run_abuse
    from isthmus.experiments.rigs.abuse.attacked_edge import LIFTED
    from isthmus.experiments.rigs.abuse.bare_server import PLANTED

    chosen = names_of(attacks, "attacks") if attacks else ALL
    settings = AbuseSettings(model, edge_layers, chosen, seconds, threads)

    def work() -> dict[str, Any]:
        steps = len(chosen) + len(PLANTED) + len(LIFTED)
        with working_folder(keep) as folder, stderr_progress("attacks", steps) as advance:
            return run_abuse(settings, folder, advance)

    result = to_its_end(work)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _print_tables(result, typer.echo)
    if not (result["held"] and result["planted_caught"]):
        raise typer.Exit(1)


def _print_tables(result: dict[str, Any], echo: Callable[[str], None]) -> None:
    """The rows as tables of at most 80 columns."""
    line = "{:28} {:>10} {:>9} {:12} {:5} {:>8}".format
    echo(line("attack", "measured", "ceiling", "unit", "held", "slower"))
    for row in result["runs"]:
        held = "yes" if row["held"] else "NO"
        slower = "-" if row["latency_ratio"] is None else f"{row['latency_ratio']} x"
        echo(line(row["attack"], row["measured"], row["ceiling"], row["unit"], held, slower))
    echo("")
    echo(line("planted weakness", "measured", "ceiling", "unit", "", "caught"))
    for row in result["planted"]:
        caught = "yes" if row["caught"] else "NO"
        echo(line(row["weakness"], row["measured"], row["ceiling"], row["unit"], "", caught))
