"""The commands of measuring: `isthmus bench …` and `isthmus demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.common.readable import lines
from isthmus.experiments.benchmarks.kernels_command import kernels
from isthmus.experiments.placements.placements_command import placements
from isthmus.experiments.precision.codec_bench_command import codecs
from isthmus.experiments.precision.quantize_bench_command import quantize
from isthmus.experiments.rigs.abuse.abuse_command import abuse
from isthmus.experiments.rigs.chaos.chaos_command import chaos
from isthmus.experiments.rigs.network.link_bench_command import link
from isthmus.experiments.serving.qos_command import qos
from isthmus.experiments.serving.scheduler_command import scheduler
from isthmus.experiments.serving.tenants_command import tenants

bench = typer.Typer(help="Measure; every figure in the documents comes from one of these.", no_args_is_help=True)
bench.command()(link)
bench.command()(placements)
bench.command()(codecs)
bench.command()(kernels)
bench.command()(quantize)
bench.command()(tenants)
bench.command()(qos)
bench.command()(scheduler)
bench.command()(chaos)
bench.command()(abuse)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model = Annotated[str, typer.Option(help="A name (smollm2-135m), a local folder, a GGUF file or a hub id.")]
EdgeLayers = Annotated[str, typer.Option(help="How many of the first and of the last layers the edge holds.")]
Keep = Annotated[Path | None, typer.Option(help="Folder for the run's files; by default they are gone afterwards.")]


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result))
        return
    for line in lines(result, 32):
        typer.echo(line)


@bench.command()
def parity(
    model: Model = "smollm2-135m",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 10,
    edge_layers: EdgeLayers = "2:2",
    codec: Annotated[str, typer.Option(help="Codec of the wire, as for `edge train`.")] = "fp32",
    cloud_dtype: Annotated[str, typer.Option(help="What the cloud computes in: fp32 or bf16.")] = "fp32",
    batch: Annotated[int, typer.Option(min=1, help="Examples per step.")] = 4,
    seq: Annotated[int, typer.Option(min=2, help="Tokens per example at most.")] = 128,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of AdamW.")] = 1e-3,
    threads: Annotated[int, typer.Option(min=1, help="torch threads on either side.")] = 1,
    data: Annotated[
        str, typer.Option(help="A data file as for `edge train`; by default a few sentences of real text.")
    ] = "",
    pipeline: Annotated[int, typer.Option(min=1, help="Actors of the cloud that its layers are divided among.")] = 1,
    keep: Keep = None,
    as_json: AsJson = False,
) -> None:
    """Compare a split run (real processes, sealed gRPC) with a single-process run, bit for bit.

    Example: isthmus bench parity --model smollm2-135m --steps 10 --json
    """
    from isthmus.experiments.benchmarks.parity import ParitySettings, run_parity
    from isthmus.experiments.harness.launch import working_folder

    settings = ParitySettings(
        model, edge_layers, steps, batch, seq, codec, cloud_dtype, learning_rate, threads, data, pipeline
    )
    with working_folder(keep) as folder:
        _print(run_parity(settings, folder), as_json)


@bench.command()
def faults(
    model: Model = "smollm2-135m",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of either run.")] = 40,
    per_phase: Annotated[int, typer.Option(min=1, help="Faults of each phase that have to count.")] = 3,
    phases: Annotated[str, typer.Option(help="Phases to break, comma-separated; by default all.")] = "",
    edge_layers: EdgeLayers = "2:2",
    batch: Annotated[int, typer.Option(min=1, help="Examples per step.")] = 2,
    seq: Annotated[int, typer.Option(min=32, help="Tokens per example at most.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="torch threads on either side.")] = 1,
    keep: Keep = None,
    as_json: AsJson = False,
) -> None:
    """Break whatever can break during one training run, and compare it with an undisturbed one, bit for bit.

    Connections are cut in each phase of a call, the worker and the edge are killed, the cloud is restarted and forgets
    forward states. A fault counts only where a call in flight failed or was repeated because of it.

    Example: isthmus bench faults --json
    """
    from isthmus.experiments.harness.launch import working_folder
    from isthmus.experiments.rigs.faults.fault_plan import PHASES
    from isthmus.experiments.rigs.faults.faults import FaultSettings, run_faults

    chosen = tuple(phases.split(",")) if phases else PHASES
    settings = FaultSettings(model, edge_layers, steps, batch, seq, per_phase, chosen, threads=threads)
    with working_folder(keep) as folder:
        _print(run_faults(settings, folder), as_json)


@bench.command()
def step(
    model: Model = "smollm2-135m",
    edge_layers: EdgeLayers = "2:2",
    codec: Annotated[str, typer.Option(help="Codec of the wire, as for `edge train`.")] = "fp32",
    cloud_dtype: Annotated[str, typer.Option(help="What the cloud computes in: fp32 or bf16.")] = "fp32",
    quantize: Annotated[str, typer.Option(help="How the cloud holds its weights: none, int8 or nf4.")] = "none",
    batch: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 4,
    seq: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 128,
    pairs: Annotated[int, typer.Option(min=5, help="Steps of either kind, in turns.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="torch threads on either side and in the single process.")] = 2,
    keep: Keep = None,
    as_json: AsJson = False,
) -> None:
    """Compare the time of a split step with that of a single-process PEFT step.

    Example: isthmus bench step --model smollm2-135m --cloud-dtype bf16 --codec bf16 --json
    """
    from isthmus.experiments.benchmarks.step import StepSettings, run_step
    from isthmus.experiments.harness.launch import working_folder

    settings = StepSettings(model, edge_layers, codec, cloud_dtype, batch, seq, pairs, threads, quantize)
    with working_folder(keep) as folder:
        _print(run_step(settings, folder), as_json)


@bench.command()
def curve(
    data: Annotated[str, typer.Option(help="A data file as for `edge train`.")],
    model: Model = "smollm2-135m",
    edge_layers: EdgeLayers = "2:2",
    prompt_template: Annotated[str | None, typer.Option(help="As for `edge train`.")] = None,
    completion_template: Annotated[str | None, typer.Option(help="As for `edge train`.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Examples per step.")] = 4,
    learning_rate: Annotated[float, typer.Option(min=0, help="Peak, of AdamW.")] = 1e-3,
    validation_split: Annotated[float, typer.Option(min=0, max=0.9, help="Fraction held out.")] = 0.03,
    threads: Annotated[int, typer.Option(min=1, help="torch threads on either side.")] = 2,
    figure: Annotated[Path | None, typer.Option(help="PNG to draw the two curves to (needs matplotlib).")] = None,
    keep: Keep = None,
    as_json: AsJson = False,
) -> None:
    """Run `edge train` on real data, and the same in one process; compare the loss curves step by step.

    Example: isthmus bench curve --data tickets.jsonl --steps 200 --figure curve.png --json
    """
    from isthmus.experiments.benchmarks.curve import run_curve
    from isthmus.experiments.harness.launch import working_folder

    options = {
        "data": data,
        "prompt_template": prompt_template,
        "completion_template": completion_template,
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "validation_split": validation_split,
        "threads": threads,
    }
    given = {name: value for name, value in options.items() if value is not None}
    with working_folder(keep) as folder:
        _print(run_curve(model, edge_layers, given, folder, figure), as_json)


def demo(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 40,
    threads: Annotated[int, typer.Option(min=1, help="torch threads on either side.")] = 2,
    keep: Keep = None,
) -> None:
    """Tune SmolLM2-135M across the strip on generated tickets, show what it learned and what crossed, and prove parity.

    Example: isthmus demo
    """
    from isthmus.experiments.benchmarks.demo import run_demo
    from isthmus.experiments.harness.launch import working_folder

    with working_folder(keep) as folder:
        run_demo(folder, steps, threads)
