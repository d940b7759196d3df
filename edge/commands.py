"""The commands of the data owner: `isthmus edge keygen | train | eval | generate`."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.edge.config import DEFAULT_KEY, TrainConfig, load_config

app = typer.Typer(
    help="Tune a model whose middle layers run in the cloud, on data that stay here.", no_args_is_help=True
)

INTERRUPTED = 130  # as shells say it


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

    from isthmus.protocol.keys import generate_edge

    path = out.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    line = generate_edge(path, comment or getpass.getuser())
    typer.echo(f"private key  {path}")
    typer.echo(f"public key   {path}.pub (send it to the cloud's owner)")
    typer.echo(line.strip())


def _flags(skip: tuple[str, ...] = ()) -> list[inspect.Parameter]:
    """One flag for every field of `TrainConfig`, with the field's own description."""
    flags = []
    for name, field in TrainConfig.model_fields.items():
        if name in skip:
            continue
        default = "" if field.is_required() or field.default is None else f" [default: {field.default}]"
        option = typer.Option(
            f"--{name.replace('_', '-')}" + (f"/--no-{name.replace('_', '-')}" if field.annotation is bool else ""),
            help=f"{field.description}{default}",
            show_default=False,
        )
        flags.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[_plain(field.annotation) | None, option],
            )
        )
    return flags


def _plain(annotation: Any) -> Any:
    """The type that the command line parses for a field; choices and ranges are checked by the configuration itself."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation if annotation in (int, float, bool, Path) else str


def _with_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `**flags` the flags of `TrainConfig`."""
    hints = typing.get_type_hints(function, include_extras=True)
    named = [p for p in inspect.signature(function).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    own = [p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in named]
    function.__signature__ = inspect.Signature([*own, *_flags()])  # type: ignore[attr-defined]  # typer reads it
    return function


@app.command()
@_with_flags
def train(
    config: Annotated[
        Path | None, typer.Option("--config", help="A TOML file with the same names; flags win over it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON at the end.")] = False,
    **flags: Any,
) -> None:
    """Tune adapters on your data; the cloud sees activations, never text, labels or adapters.

    Ends with a PEFT folder (OUT/adapter) and OUT/report.json.

    Example: isthmus edge train --cloud cloud.txt --data tickets.jsonl --steps 200 --out run
    """
    settings = load_config(config, flags)
    from isthmus.edge.run import run_training

    try:
        report = run_training(settings)
    except KeyboardInterrupt as stop:
        typer.echo(f"isthmus: {stop or 'stopped'}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(report.to_json() if as_json else report.lines(settings.out))


@app.command("eval")
@_with_flags
def evaluate(
    config: Annotated[
        Path | None, typer.Option("--config", help="A TOML file with the same names; flags win over it.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="A PEFT folder; without it, the model as it is served.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **flags: Any,
) -> None:
    """Measure the loss on your data, with or without an adapter. Data and column flags are those of `train`.

    Example: isthmus edge eval --cloud cloud.txt --data held-out.jsonl --adapter run/adapter --json
    """
    settings = load_config(config, flags)
    from isthmus.edge.run import run_evaluation

    result = run_evaluation(settings, adapter)
    typer.echo(json.dumps(result) if as_json else f"loss {result['loss']:.4f} over {result['examples']} examples")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    cloud: Annotated[str, typer.Option(help="Connection string, or the path of a file that holds it.")],
    key: Annotated[Path, typer.Option(help="The edge's private key.")] = DEFAULT_KEY,
    adapter: Annotated[Path | None, typer.Option(help="A PEFT folder; without it, the model as it is served.")] = None,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 for greedy; higher is more random.")] = 0.0,
    codec: Annotated[str, typer.Option(help="How activations cross the strip: fp32, bf16, fp16 or int8.")] = "fp32",
    tls_ca: Annotated[Path | None, typer.Option(help="Certificate authority of the outer TLS layer.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="The edge's own TLS certificate.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key of --tls-cert.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Continue a prompt with the split model.

    Example: isthmus edge generate --cloud cloud.txt --adapter run/adapter "Ticket: my card was charged twice"
    """
    settings = load_config(
        None,
        {
            "cloud": cloud,
            "key": key,
            "data": "-",
            "codec": codec,
            "tls_ca": tls_ca,
            "tls_cert": tls_cert,
            "tls_key": tls_key,
        },
    )
    from isthmus.edge.run import open_link, run_generation

    with open_link(settings) as link:
        text = run_generation(link, adapter, prompt, chat=chat, max_new_tokens=max_new_tokens, temperature=temperature)
        traffic = link.totals()
    if as_json:
        typer.echo(json.dumps({"text": text, "bytes_up": traffic.bytes_up, "bytes_down": traffic.bytes_down}))
    else:
        typer.echo(text)
