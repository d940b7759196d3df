"""The researcher's commands for emulators: `isthmus emulator table | score | cost | pretrain`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from isthmus.common.readable import lines
from isthmus.common.shutdown import interruptible
from isthmus.experiments.harness.emulator_settings import MEASUREMENTS

app = typer.Typer(no_args_is_help=True)
for _name, _measurement in MEASUREMENTS.items():
    app.command(_name)(_measurement.command())


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="Folder of the model; must not exist.")],
    text: Annotated[Path, typer.Option(help="Public text, .txt, or .jsonl with `text`.")],
    family: Annotated[str, typer.Option(help="Architecture: gpt2, qwen3, llama, …")] = "gpt2",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 600,
    layers: Annotated[int, typer.Option(min=3, help="Decoder layers.")] = 10,
    hidden: Annotated[int, typer.Option(min=32, help="Width of the hidden states, a multiple of 32.")] = 96,
    vocabulary: Annotated[int, typer.Option(min=260, help="Tokens of the tokenizer.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Blocks of a step.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 128,
    learning_rate: Annotated[float, typer.Option(min=0, help="Peak of AdamW's learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and of the order of the text.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Pretrain a tiny model of any family on public text, to run the table on a second architecture.

    Example: isthmus emulator pretrain --family qwen3 --text public.txt --out tiny-qwen3
    """
    from isthmus.experiments.offsite.pretrain import PretrainSettings, run_pretrain

    settings = PretrainSettings(
        family=family,
        text=text,
        out=out,
        steps=steps,
        layers=layers,
        hidden=hidden,
        vocabulary=vocabulary,
        batch=batch,
        length=length,
        learning_rate=learning_rate,
        seed=seed,
        threads=threads,
    )
    with interruptible():
        result = run_pretrain(settings)
    if as_json:
        typer.echo(json.dumps(result))
        return
    for line in lines(result, 24):
        typer.echo(line)
