"""The model owner's commands: `isthmus cloud keygen | enroll | revoke | quantize | serve | status`, and a cluster's."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.cli import cluster_commands
from isthmus.cli.cloud_flags import DEFAULT_HOME, Home, RootPassphraseFile, WithPassphrase
from isthmus.cli.serve_command import serve
from isthmus.experiments.harness.bench_flags import EdgeLayers, Model

app = typer.Typer(help="Serve a frozen backbone to enrolled edges.", no_args_is_help=True)


@app.command()
def keygen(
    home: Home = DEFAULT_HOME,
    days: Annotated[int, typer.Option(min=1, help="Days until the worker's certificate expires.")] = 90,
    passphrase: WithPassphrase = True,
    passphrase_file: RootPassphraseFile = None,
    worker_passphrase_file: Annotated[
        Path | None,
        typer.Option(
            help="File that holds the worker key's passphrase; by default that key has none, as `serve` needs it."
        ),
    ] = None,
) -> None:
    """Make the root key (once) and a worker's key with a certificate; run again to renew the latter.

    Keep root_key offline afterwards: a worker needs only worker_key and worker_cert. The root key has a passphrase.

    Example: isthmus cloud keygen
    """
    from isthmus.common.errors import KeyFileError
    from isthmus.protocol.secure.keyfiles import check_folder, make_folder
    from isthmus.protocol.secure.keys import OF_WORKER, generate_root, issue_worker, load_worker
    from isthmus.protocol.secure.passphrases import Passphrase

    root = Passphrase("root", passphrase_file, asks=True)
    worker = None if worker_passphrase_file is None else Passphrase("worker", worker_passphrase_file)
    folder = home.expanduser()
    make_folder(folder)  # before anything is looked for in a place where this user may not look
    check_folder(folder)
    if not (folder / "root_key").exists():
        if (folder / "worker_cert").exists():
            raise KeyFileError(
                f"{folder} has a worker's certificate but not the root_key that signed it, and a new one would lock "
                "every edge out: bring root_key back to renew the certificate, or choose another --home"
            )
        generate_root(folder, root if passphrase else None)
    issue_worker(folder, days, root=root, new=worker)
    typer.echo(f"root key     {folder / 'root_key'} (keep it offline)")
    typer.echo(f"worker key   {folder / 'worker_key'} (certificate good for {days} days)")
    typer.echo(f"fingerprint  {load_worker(folder, passphrase=worker or OF_WORKER).pin}")


@app.command()
def enroll(
    public_key: Annotated[Path, typer.Argument(help="The edge's public key file, as `isthmus edge keygen` makes it.")],
    home: Home = DEFAULT_HOME,
    name: Annotated[str | None, typer.Option(help="The tenant's name; by default the key's comment.")] = None,
    max_sessions: Annotated[int, typer.Option(min=1, help="Sessions that the tenant may have open at once.")] = 4,
    max_bytes_in_flight: Annotated[
        str, typer.Option(help="Bytes of calls that the tenant may have in flight.")
    ] = "1GiB",
    weight: Annotated[
        int, typer.Option(min=1, help="The tenant's share of the computing against the others', where all want more.")
    ] = 1,
    max_tokens_per_second: Annotated[
        int | None, typer.Option(min=1, help="Token positions that the tenant may have computed, on average.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10**9 - 1,
            help="Token positions that the tenant may have computed in all, for a tenant who is to have packages and "
            "no training through the cloud: every answer makes a better copy of the cloud's layers.",
        ),
    ] = None,
) -> None:
    """Let an edge in: add its public key to `authorized_edges`. A running cloud notices by itself.

    Example: isthmus cloud enroll alice.pub --name alice --max-sessions 2 --weight 3
    """
    from isthmus.common.errors import ConfigError
    from isthmus.protocol.enrolment import EDGES_FILE, REVOKED_FILE, AuthorizedEdges, Quota, add_line, parse_size
    from isthmus.protocol.secure.keyfiles import read_text
    from isthmus.protocol.secure.keys import parse_public_key

    line = read_text(public_key.expanduser(), "ask the data owner for the .pub file that `isthmus edge keygen` made")
    quota = Quota(max_sessions, parse_size(max_bytes_in_flight), weight, max_tokens_per_second, max_tokens)
    path, key = home.expanduser() / EDGES_FILE, parse_public_key(line.strip())[0]
    revoked = path.with_name(REVOKED_FILE)
    if revoked.exists() and AuthorizedEdges.load(revoked).find(key) is not None:
        raise ConfigError(f"the key of {public_key} was revoked: have the data owner make another one")
    known = AuthorizedEdges.load(path).find(key) if path.exists() else None
    if known is not None:
        typer.echo(f"{known.name} {known.fingerprint} is enrolled already: nothing was changed")
        if quota != known.quota or name not in (None, known.name):
            typer.echo(f"to change its name or its quota, edit its line in {path}")
        return
    tenant = add_line(path, line, name, quota)
    typer.echo(f"enrolled {tenant.name} {tenant.fingerprint}")


@app.command()
def revoke(
    edge: Annotated[str, typer.Argument(help="The tenant's name, the key's fingerprint, or the public key file.")],
    home: Home = DEFAULT_HOME,
) -> None:
    """Let an edge's key in no more: add it to `revoked_edges`. A running cloud ends its sessions within seconds.

    Example: isthmus cloud revoke alice
    """
    from isthmus.common.errors import ConfigError
    from isthmus.protocol.enrolment import EDGES_FILE, AuthorizedEdges, revoke as add_to_revoked
    from isthmus.protocol.secure.keyfiles import read_text
    from isthmus.protocol.secure.keys import Fingerprint, parse_public_key

    folder, file = home.expanduser(), Path(edge).expanduser()
    path = folder / EDGES_FILE
    key = AuthorizedEdges.load(path).key_of(edge) if path.exists() else None
    is_file = False
    with contextlib.suppress(OSError):  # a name that is too long, or a folder that this user may not enter
        is_file = file.is_file()
    if key is None and is_file:
        key = parse_public_key(read_text(file, "give the .pub file").strip())[0]
    if key is None:
        raise ConfigError(f"{edge} is no tenant and no fingerprint of {path}, and no file: give one of the three")
    done = "revoked" if add_to_revoked(folder, key) else "was revoked already:"
    typer.echo(f"{done} {Fingerprint.of(key)}")


app.command()(serve)


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write; what `serve --model` is then given.")],
    to: Annotated[
        str, typer.Option("--quantize", help="How the weights of the cloud's layers are held: int8 or nf4.")
    ] = "nf4",
    edge_layers: EdgeLayers = "2:2",
    dtype: Annotated[str, typer.Option(help="What the cloud's layers compute in: fp32 or bf16.")] = "bf16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a model's middle layers in fewer bits, with the edge's parts: all that `serve` needs of the model.

    Example: isthmus cloud quantize --model smollm2-135m --quantize nf4 --out smollm2-nf4
    """
    from isthmus.backbone.checkpoints.sources import resolve
    from isthmus.backbone.checkpoints.span_format import check_dtype
    from isthmus.backbone.checkpoints.weight_quantization import quantizer_of
    from isthmus.backbone.plan import SplitPlan
    from isthmus.backbone.split.saved_span import save_span
    from isthmus.common.errors import ConfigError

    quantizer = quantizer_of(to)
    if quantizer is None:
        raise ConfigError("--quantize none leaves nothing to write: serve the model itself, or choose int8 or nf4")
    check_dtype(dtype)
    checkpoint = resolve(model)
    plan = SplitPlan.parse(edge_layers, checkpoint.n_layers)
    size, dense = save_span(checkpoint, plan, out.expanduser(), dtype=dtype, quantizer=quantizer)
    if as_json:
        said = {"out": str(out), "model": checkpoint.name, "plan": str(plan), "dtype": dtype, "quantize": to}
        typer.echo(json.dumps({**said, "span_bytes": size, "dense_bytes": dense}))
        return
    typer.echo(
        f"{out}: layers {plan.cloud} of {checkpoint.name} as {to}, {size / 2**20:.1f} MiB of memory instead of "
        f"{dense / 2**20:.1f} in {dtype}"
    )


@app.command()
def status(
    home: Home = DEFAULT_HOME,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; with --watch, a line of it each time.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until Ctrl-C, also while the cloud is away.")] = False,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two updates, with --watch.")] = 1.0,
) -> None:
    """Show what the cloud on this machine serves: model, plan, and each worker's sessions, load, stash and restarts.

    Example: isthmus cloud status --watch
    """
    from isthmus.cloud.control.serve_state import read_status

    folder = home.expanduser()
    if as_json:
        typer.echo(json.dumps(read_status(folder)))
        while watch:
            time.sleep(every)
            typer.echo(json.dumps(_next_status(folder)))
        return
    from rich.console import Console
    from rich.live import Live

    from isthmus.cloud.control.status_view import view

    shown = view(read_status(folder))
    if not watch:
        # Whoever reads a pipe wants the connection string in one line.
        Console(width=None if sys.stdout.isatty() else 4096).print(shown)
        return
    with Live(shown, auto_refresh=False) as live:
        while True:
            time.sleep(every)
            live.update(view(_next_status(folder)), refresh=True)


def _next_status(home: Path) -> dict[str, Any]:
    """The status of a cloud that has answered before; where it does not answer now, this state and the reason."""
    from isthmus.cloud.control.serve_state import read_status
    from isthmus.common.errors import UnreachableError

    try:
        return read_status(home)
    except UnreachableError as error:
        return {"state": "unreachable", "error": str(error), "workers": []}


cluster_commands.register(app)
