"""The command `isthmus bench placements`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.experiments.harness.bench_flags import numbers_of, precision_of, to_its_end


def placements(
    model: Annotated[
        str, typer.Option(help="A name (smollm2-135m), a local folder, a GGUF file or a hub id.")
    ] = "smollm2-135m",
    modes: Annotated[str, typer.Option(help="Modes, comma-separated; by default all.")] = "",
    edge_layers: Annotated[
        str, typer.Option(help="How many of the first and of the last layers the edge holds.")
    ] = "2:2",
    costs: Annotated[bool, typer.Option(help="Whether to measure what a step costs, at fp32.")] = True,
    scores: Annotated[bool, typer.Option(help="Whether to train and to score on held-out data.")] = True,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 8,
    target_modules: Annotated[
        str | None, typer.Option(help="Modules that get adapters, comma-separated; the family's usual ones by default.")
    ] = None,
    taps: Annotated[int, typer.Option(min=1, help="Layers that the ladder reads.")] = 4,
    dropout: Annotated[
        float, typer.Option(min=0, max=0.99, help="In front of the adapters where costs are measured.")
    ] = 0.1,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step whose cost is measured.")] = 4,
    seq: Annotated[int, typer.Option(min=2, help="Tokens of such a sequence.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Steps that count, of each run whose cost is measured.")] = 7,
    task: Annotated[str, typer.Option(help="What runs are scored on: e2e, openbookqa, arc_easy or sst2.")] = "e2e",
    data_folder: Annotated[
        Path | None, typer.Option(help="Where the tasks lie; default: shared/data beside the checkout.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a scored run.")] = 400,
    score_batch: Annotated[int, typer.Option(min=1, help="Examples of a step of a scored run.")] = 2,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens of an example at most.")] = 256,
    learning_rates: Annotated[str, typer.Option(help="Candidate learning rates, for every mode.")] = "1e-3,3e-3",
    seeds: Annotated[
        int,
        typer.Option(
            min=1, help="Seeds of the modes that choose sites, and of `edge` or else `single`; one of the others."
        ),
    ] = 3,
    test: Annotated[int | None, typer.Option(min=2, help="Held-out documents; by default the task's.")] = None,
    validation: Annotated[int, typer.Option(min=1, help="Training examples that rates are chosen by.")] = 32,
    precision: Annotated[str, typer.Option(help="What the edge of a scored run computes in: fp32 or bf16.")] = "bf16",
    cloud_dtype: Annotated[str, typer.Option(help="What its cloud computes in: fp32 or bf16.")] = "bf16",
    threads: Annotated[int, typer.Option(min=1, help="torch threads on either side.")] = 1,
    figure: Annotated[Path | None, typer.Option(help="PNG of the held-out loss against bytes.")] = None,
    budget_figure: Annotated[Path | None, typer.Option(help="PNG of the held-out loss against site traffic.")] = None,
    sites_figure: Annotated[Path | None, typer.Option(help="PNG of kill-and-revive's live sites over time.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for finished pieces; the same command goes on there.")] = Path(
        "isthmus-placements"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare every way of training: bytes, round trips, memory, step time and held-out loss, beside a single process.

    The modes are single, u_shape, tail_cache, taps, edge, edge_summed, kill_revive, random, even, low_rank and leased;
    kill_revive@0.05 has 5 % of always-on's site traffic. An interrupted benchmark goes on when the same command is
    repeated.

    Example: isthmus bench placements --json

    The costs alone: isthmus bench placements --no-scores
    """
    from isthmus.common.figures import plotting
    from isthmus.experiments.placements.placement_costs import CostSettings
    from isthmus.experiments.placements.placement_figures import draw_budgets, draw_losses, draw_sites
    from isthmus.experiments.placements.placement_modes import modes_of
    from isthmus.experiments.placements.placement_scores import Regime
    from isthmus.experiments.placements.placements import PlacementSettings, run_placements
    from isthmus.experiments.scoring.tasks import Sizes, default_data_folder

    shared: dict[str, Any] = {"rank": rank, "taps": taps}
    if target_modules is not None:
        shared["target_modules"] = target_modules
    cost = CostSettings(model, edge_layers, shared, dropout, batch, seq, rounds, steps, threads)
    sizes = Sizes(test=test, validation=validation, max_length=max_length)
    regime = Regime(
        task=task,
        data_folder=default_data_folder() if data_folder is None else data_folder,
        sizes=sizes,
        steps=steps,
        batch=score_batch,
        rates=numbers_of(learning_rates, "learning-rates"),
        seeds=seeds,
        precision=precision_of(precision, "precision"),
        cloud_dtype=precision_of(cloud_dtype, "cloud-dtype"),
        threads=threads,
        shared=shared,
    )
    settings = PlacementSettings(
        model, edge_layers, tuple(modes_of(modes)), cost if costs else None, regime if scores else None, out
    )
    if figure or budget_figure or sites_figure:
        plotting()  # a missing package is told before the long run, not after it
    result = to_its_end(lambda: run_placements(settings))
    if figure is not None:
        draw_losses(result, figure)
    if budget_figure is not None:
        draw_budgets(result, budget_figure)
    if sites_figure is not None and result["decisions"]:
        draw_sites(result["decisions"], steps, sites_figure)
    if as_json:
        typer.echo(json.dumps(result))
        return
    _show(result)


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("mode", "step", "up", "down", "trips", "edge FLOPs", "edge memory", "equal", "diff", "score"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for row in result["runs"]:
        table.add_row(
            row["mode"],
            _number(row["step_ratio"], ".2f"),
            _number(row["bytes_per_token_up"], ",.0f"),
            _number(row["bytes_per_token_down"], ",.0f"),
            _number(row["round_trips"], "g"),
            _number(row["edge_flops_share"], ".0%"),
            "-" if row["edge_peak_bytes"] is None else f"{row['edge_peak_bytes'] / 2**20:,.0f} MiB",
            {None: "-", True: "yes", False: "no"}[row["bitwise_equal"]],
            _number(row["max_abs_diff"], ".1e"),
            _number(row["score"], ".4f"),
        )
    Console().print(table)
    typer.echo("step: time over a single process's; up, down: bytes per token; equal, diff: to the single process")
    for name, share in (result["kill_revive"] or {}).get("gain_shares", {}).items():
        typer.echo(f"{name} has {share:.1%} of always-on's gain")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
