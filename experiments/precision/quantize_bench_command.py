"""The command `isthmus bench quantize`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from isthmus.experiments.harness.bench_flags import precision_of, to_its_end


def quantize(
    model: Annotated[
        str, typer.Option(help="A name (smollm2-135m), a local folder, a GGUF file or a hub id.")
    ] = "smollm2-135m",
    form: Annotated[
        list[str] | None, typer.Option(help="Any of none (fp32), bf16, int8 and nf4, repeatable; by default all.")
    ] = None,
    edge_layers: Annotated[
        str, typer.Option(help="How many of the first and of the last layers the edge holds.")
    ] = "2:2",
    task: Annotated[str, typer.Option(help="What runs are scored on: e2e, openbookqa, arc_easy or sst2.")] = "e2e",
    data_folder: Annotated[
        Path | None, typer.Option(help="Where the tasks lie; default: shared/data beside the checkout.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a scored run.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Examples of a step.")] = 4,
    seq: Annotated[int, typer.Option(min=2, help="Tokens per sequence of a timed step.")] = 128,
    pairs: Annotated[int, typer.Option(min=5, help="Timed steps of either kind, in turns.")] = 9,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens of an example at most.")] = 256,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of every run.")] = 1e-3,
    test: Annotated[int | None, typer.Option(min=2, help="Held-out documents; by default the task's.")] = None,
    precision: Annotated[str, typer.Option(help="What the edge computes in: fp32 or bf16.")] = "fp32",
    threads: Annotated[int, typer.Option(min=1, help="torch threads on either side.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for finished pieces; the same command goes on there.")] = Path(
        "isthmus-quantize"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare ways of holding the backbone: memory of the span, time of a step, loss after the same tuning.

    Example: isthmus bench quantize --json

    Two of them: isthmus bench quantize --form none --form nf4
    """
    from isthmus.experiments.benchmarks.step import StepSettings
    from isthmus.experiments.placements.placement_scores import Regime
    from isthmus.experiments.precision.quantize_bench import FORMS, QuantizeSettings, run_quantize
    from isthmus.experiments.scoring.tasks import Sizes, default_data_folder

    regime = Regime(
        task=task,
        data_folder=default_data_folder() if data_folder is None else data_folder,
        sizes=Sizes(test=test, validation=16, max_length=max_length),
        steps=steps,
        batch=batch,
        rates=(learning_rate,),
        seeds=1,
        precision=precision_of(precision, "precision"),
        cloud_dtype="fp32",
        threads=threads,
    )
    timed = StepSettings(model, edge_layers, batch=batch, seq=seq, pairs=pairs, threads=threads)
    settings = QuantizeSettings(tuple(form or FORMS), timed, regime, out)
    result = to_its_end(lambda: run_quantize(settings))
    if as_json:
        typer.echo(json.dumps(result))
        return
    for row in result["runs"]:
        typer.echo(
            f"{row['quantize']:5} computing in {row['cloud_dtype']}   span {row['span_bytes'] / 2**20:7.1f} MiB   "
            f"step {row['step_ratio']:.2f} of a single process   loss {row['held_out_loss']:.4f} "
            f"(untuned {row['zero_shot_loss']:.4f})"
        )
