"""The command `isthmus bench codecs`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from isthmus.experiments.harness.bench_flags import precision_of, to_its_end


def codecs(
    model: Annotated[
        str, typer.Option(help="A name (smollm2-135m), a local folder, a GGUF file or a hub id.")
    ] = "smollm2-135m",
    codec: Annotated[
        list[str] | None,
        typer.Option(help="Codecs as `edge train --codec` has them, repeatable; by default a choice of all."),
    ] = None,
    edge_layers: Annotated[
        str, typer.Option(help="How many of the first and of the last layers the edge holds.")
    ] = "2:2",
    task: Annotated[str, typer.Option(help="What runs are scored on: e2e, openbookqa, arc_easy or sst2.")] = "e2e",
    data_folder: Annotated[
        Path | None, typer.Option(help="Where the tasks lie; default: shared/data beside the checkout.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a run.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Examples of a step.")] = 4,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens of an example at most.")] = 256,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of every run.")] = 1e-3,
    test: Annotated[int | None, typer.Option(min=2, help="Held-out documents; by default the task's.")] = None,
    probes: Annotated[int, typer.Option(min=1, help="Micro-batches that gradients are compared on.")] = 8,
    precision: Annotated[str, typer.Option(help="What the edge computes in: fp32 or bf16.")] = "fp32",
    cloud_dtype: Annotated[str, typer.Option(help="What the cloud computes in: fp32 or bf16.")] = "fp32",
    threads: Annotated[int, typer.Option(min=1, help="torch threads on either side.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for finished pieces; the same command goes on there.")] = Path(
        "isthmus-codecs"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the strip's codecs: bytes for a token, cosine of the adapters' gradients, loss after a whole run.

    Example: isthmus bench codecs --json

    Two of them: isthmus bench codecs --codec int8 --codec int4-outliers,int4
    """
    from isthmus.experiments.placements.placement_scores import Regime
    from isthmus.experiments.precision.codec_bench import CODECS, CodecSettings, run_codecs
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
        cloud_dtype=precision_of(cloud_dtype, "cloud-dtype"),
        threads=threads,
    )
    settings = CodecSettings(model, edge_layers, tuple(codec or CODECS), regime, probes, out)
    result = to_its_end(lambda: run_codecs(settings))
    if as_json:
        typer.echo(json.dumps(result))
        return
    for row in result["runs"]:
        typer.echo(
            f"{row['codec']:24} {row['bytes_per_token']:7.0f} bytes per token   cosine {row['gradient_cosine']:.4f} "
            f"(least {row['gradient_cosine_min']:.4f})   loss {row['held_out_loss']:.4f}, "
            f"{row['loss_over_fp32'] - 1:+.2%} over fp32"
        )
