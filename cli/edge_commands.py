"""The commands of the data owner: `isthmus edge keygen | train | eval | generate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.common.terminal import shown
from isthmus.edge.config.client_config import DEFAULT_KEY, EvalConfig, GenerateConfig
from isthmus.edge.config.flags import (
    AsJson,
    GroupedCommand,
    SharedConfigFile,
    read_settings,
    run_to_its_end,
    with_flags,
)
from isthmus.edge.config.training_config import TrainConfig, load_config

app = typer.Typer(
    help="Tune a model whose middle layers run in the cloud, on data that stay here.", no_args_is_help=True
)

Adapter = Annotated[
    Path | None,
    typer.Option(help="An adapter's folder; without it, the model as it is served.", rich_help_panel="Adapter"),
]


@app.command()
def keygen(
    out: Annotated[
        Path, typer.Option(help="Where the private key goes; the public one gets `.pub` behind it.")
    ] = DEFAULT_KEY,
    comment: Annotated[str, typer.Option(help="A name for the key, which the cloud's owner sees.")] = "",
) -> None:
    """Make this edge's key pair. Send the .pub file to the cloud's owner.

    Example: isthmus edge keygen --comment alice
    """
    import getpass

    from isthmus.protocol.secure.keys import generate_edge

    path = out.expanduser()
    line = generate_edge(path, comment or getpass.getuser())
    typer.echo(f"private key  {path}")
    typer.echo(f"public key   {path}.pub (send it to the cloud's owner)")
    typer.echo(line.strip())


@app.command(cls=GroupedCommand)
@with_flags(TrainConfig)
def train(
    config: SharedConfigFile = None,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Tune adapters on your data; the cloud sees activations, never text, labels or adapters.

    Ends with the adapter's folder (OUT/adapter) and OUT/report.json.

    Example: isthmus edge train --cloud cloud.txt --data tickets.jsonl --steps 200 --out run
    """
    settings = load_config(config, flags, TrainConfig)
    from isthmus.edge.split_run import run_training

    run_to_its_end(lambda: run_training(settings), settings.out, as_json=as_json)


@app.command("eval", cls=GroupedCommand)
@with_flags(EvalConfig)
def evaluate(
    config: SharedConfigFile = None,
    adapter: Adapter = None,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Measure the loss on all of your data, with or without an adapter.

    Example: isthmus edge eval --cloud cloud.txt --data held-out.jsonl --adapter run/adapter --json
    """
    settings = load_config(config, flags, EvalConfig)
    from isthmus.edge.split_run import run_evaluation

    result = run_evaluation(settings, adapter)
    typer.echo(json.dumps(result) if as_json else f"loss {result['loss']:.4f} over {result['examples']} examples")


@app.command(cls=GroupedCommand)
@with_flags(GenerateConfig)
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    config: SharedConfigFile = None,
    adapter: Adapter = None,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 for greedy; higher is more random.")] = 0.0,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Continue a prompt with the split model.

    Example: isthmus edge generate --cloud cloud.txt --adapter run/adapter "Ticket: my card was charged twice"
    """
    settings = read_settings(GenerateConfig, config, flags)
    from isthmus.edge.cloud_link import open_link
    from isthmus.edge.split_run import run_generation

    with open_link(settings, interactive=True, deadline=settings.deadline) as link:
        text = run_generation(
            link,
            adapter,
            prompt,
            plugged=settings.plugged,
            chat=chat,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        )
        traffic = link.totals()
    if as_json:
        typer.echo(json.dumps({"text": text, "bytes_up": traffic.bytes_up, "bytes_down": traffic.bytes_down}))
    else:
        typer.echo(shown(text, sys.stdout), color=True)  # what goes elsewhere than to a terminal is the text as it is
