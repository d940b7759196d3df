"""The data owner's commands for emulators: `isthmus emulator fetch | fit | tune | return`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.common.shutdown import interruptible
from isthmus.edge.config.client_config import ClientConfig, FitConfig
from isthmus.edge.config.flags import AsJson, ConfigFile, GroupedCommand, read_settings, run_to_its_end, with_flags
from isthmus.edge.config.training_config import TuneConfig

if TYPE_CHECKING:
    from isthmus.edge.client.link import Link

app = typer.Typer(no_args_is_help=True)


@app.command(cls=GroupedCommand)
@with_flags(ClientConfig, without={"codec"})
def fetch(
    out: Annotated[Path, typer.Option(help="Where the package goes: a new folder, or an older package.")],
    package: Annotated[
        str | None, typer.Option(help="Name of the package, where the cloud offers several; by default the only one.")
    ] = None,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Fetch a package that a cloud offers, verified by the fingerprint in its connection string.

    An interrupted download goes on when the same command is repeated; what has come lies in OUT.part.

    Example: isthmus emulator fetch --cloud cloud.txt --out package
    """
    with _session(flags) as link:
        fetched = link.fetch_package(out, package)
        came = link.totals().bytes_down
    if as_json:
        said = {"package": str(out), "id": fetched.id, "model": fetched.model, "digest": fetched.digest}
        typer.echo(json.dumps(said | {"plan": str(fetched.plan), "signer": str(fetched.signer), "bytes_down": came}))
        return
    typer.echo(f"package  {out} ({fetched.model}, {fetched.manifest.recipe}, split {fetched.plan})")
    typer.echo(f"id       {fetched.id}")
    typer.echo(f"signer   {fetched.signer}")


@app.command(cls=GroupedCommand)
@with_flags(FitConfig, without={"max_length", "max_fetch_gib"})
def fit(
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Make a package's emulator better for your task, by what the cloud answers to public texts.

    One linear map is fitted here and kept in PACKAGE.bridge, from where `tune` takes it. Before anything is sent, the
    command says what will be. It goes on where an interrupted one stopped.

    Example: isthmus emulator fit --cloud cloud.txt --package package --text public.jsonl --data tickets.jsonl
    """
    settings = read_settings(FitConfig, None, flags)
    from isthmus.edge.bridge_fit import run_fit

    with interruptible("stopped; the same command goes on from here"):
        fitted = run_fit(settings)
    typer.echo(fitted.to_json() if as_json else fitted.lines())


@app.command(cls=GroupedCommand)
@with_flags(TuneConfig)
def tune(
    config: ConfigFile = None,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Tune adapters on your data and an emulator of the model's middle layers; nothing connects to anywhere.

    Ends with the adapter's folder (OUT/adapter), which goes back to the model's owner, and OUT/report.json.

    Example: isthmus emulator tune --package package --data tickets.jsonl --steps 200 --out run
    """
    settings = read_settings(TuneConfig, config, flags)
    from isthmus.edge.emulator_run import run_tuning

    run_to_its_end(lambda: run_tuning(settings), settings.out, as_json=as_json)


@app.command("return", cls=GroupedCommand)
@with_flags(ClientConfig, without={"codec", "max_fetch_gib"})
def give_back(
    adapter: Annotated[Path, typer.Option(help="The adapter's folder, OUT/adapter of the tuning.")],
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Bring a tuned adapter to the cloud, which checks it and plugs it into the full model, for you alone.

    An interrupted upload goes on when the same command is repeated.

    Example: isthmus emulator return --cloud cloud.txt --adapter run/adapter
    """
    with _session(flags) as link:
        said = link.return_adapter(adapter)
        went = link.totals().bytes_up
    typer.echo(json.dumps({"message": said, "bytes_up": went}) if as_json else said)


@contextmanager
def _session(flags: dict[str, Any]) -> Iterator[Link]:
    """A link for a command that may be interrupted and repeated."""
    settings = read_settings(ClientConfig, None, flags)
    from isthmus.edge.cloud_link import open_link

    with interruptible("stopped; the same command goes on from here"), open_link(settings) as link:
        yield link
