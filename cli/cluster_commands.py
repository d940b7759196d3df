"""The commands of a cloud over several machines: `isthmus cloud issuer | node-keygen | enroll-node | attach | …`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from isthmus.cli.cloud_flags import (
    CLUSTER,
    DEFAULT_HOME,
    DEFAULT_NAME,
    UNANSWERED,
    Home,
    RootPassphraseFile,
    WithPassphrase,
)

Address = Annotated[
    str, typer.Option(help="Address of the Ray cluster that this machine is a node of, HOST:PORT or auto.")
]
Name = Annotated[str, typer.Option(help="Name of the cloud in its cluster.")]


def issuer(
    home: Home = DEFAULT_HOME,
    days: Annotated[float, typer.Option(min=0.01, help="Days until the issuer's certificate expires.")] = 7,
    passphrase: WithPassphrase = True,
    passphrase_file: RootPassphraseFile = None,
    issuer_passphrase_file: Annotated[
        Path | None, typer.Option(help="The same for the issuer's key, with ISTHMUS_ISSUER_PASSPHRASE_FILE.")
    ] = None,
) -> None:
    """Let a key sign workers' certificates in the root key's place, for some days; run again to renew.

    Run it where the root key is, then copy issuer_key and issuer_cert into the --home of `isthmus cloud serve`.

    Example: isthmus cloud issuer --days 7
    """
    from isthmus.common.readable import date
    from isthmus.protocol.secure.keyfiles import check_folder
    from isthmus.protocol.secure.keys import ISSUER_KEY, make_issuer
    from isthmus.protocol.secure.passphrases import Passphrase

    folder = home.expanduser()
    check_folder(folder)
    own = Passphrase("issuer", issuer_passphrase_file, asks=True)
    root = Passphrase("root", passphrase_file, asks=True)
    new = own if passphrase or (folder / ISSUER_KEY).exists() else None
    certificate = make_issuer(folder, days, root=root, new=new)
    typer.echo(f"issuer key   {folder / 'issuer_key'} (may sign workers until {date(certificate.not_after)})")


def node_keygen() -> None:
    """Make this node's key, whose public half the cloud's owner enrols; its workers' certificates hang on it.

    Example: isthmus cloud node-keygen
    """
    import socket

    from isthmus.cloud.nodes.worker_home import node_home
    from isthmus.protocol.secure.keys import NODE_KEY, generate_edge

    path = node_home() / NODE_KEY
    generate_edge(path, socket.gethostname())
    typer.echo(f"node key     {path} (keep it here)")
    typer.echo(f"public key   {path}.pub (for `isthmus cloud enroll-node`)")


def enroll_node(
    public_key: Annotated[Path, typer.Argument(help="The node's node_key.pub, of `isthmus cloud node-keygen`.")],
    home: Home = DEFAULT_HOME,
    name: Annotated[str | None, typer.Option(help="The node's name; by default the key's comment.")] = None,
) -> None:
    """Let a node's workers get certificates: add its public key to `authorized_nodes`. A running cloud notices.

    A line that is removed ends the node's workers, and the cloud's other workers refuse them, within seconds. Their
    certificates run out within --certificate-hours.

    Example: isthmus cloud enroll-node node_key.pub --name gpu-1
    """
    from isthmus.cloud.cluster.issuing import NODES_FILE
    from isthmus.protocol.enrolment import add_line
    from isthmus.protocol.secure.keyfiles import read_text

    line = read_text(public_key.expanduser(), "ask for the .pub file that `isthmus cloud node-keygen` made")
    node = add_line(home.expanduser() / NODES_FILE, line, name)
    typer.echo(f"enrolled node {node.name} {node.fingerprint}")


def ray_ca(
    out: Annotated[Path, typer.Option(help="Folder for the CA; keep it off the network.")],
    days: Annotated[int, typer.Option(min=1, help="Days until its certificate expires.")] = 365,
) -> None:
    """Make a certificate authority for Ray's own TLS, which a cluster of several nodes needs.

    Example: isthmus cloud ray-ca --out ray-ca
    """
    from isthmus.cloud.cluster.ray_tls import make_ca

    make_ca(out.expanduser(), days)
    typer.echo(f"Ray's CA     {out} (`isthmus cloud ray-certificate` makes each node's certificate by it)")


def ray_certificate(
    names: Annotated[list[str], typer.Argument(help="IP addresses and host names of the node, for other nodes.")],
    ca: Annotated[Path, typer.Option(help="Folder of `isthmus cloud ray-ca`.")],
    out: Annotated[Path, typer.Option(help="Folder for the node's files.")],
    at: Annotated[Path | None, typer.Option(help="Where the node will have this folder; by default --out.")] = None,
    days: Annotated[int, typer.Option(min=1, help="Days until the certificate expires.")] = 90,
) -> None:
    """Make a node's key and certificate for Ray's own TLS; prints the variables for `ray start` and `serve`.

    Example: isthmus cloud ray-certificate 10.0.0.2 --ca ray-ca --out ray-2 --at /etc/isthmus/ray
    """
    from isthmus.cloud.cluster.ray_tls import issue_node

    for name, value in issue_node(ca.expanduser(), names, out.expanduser(), days, at).items():
        typer.echo(f"export {name}={value}")


def attach(address: Address = "auto", name: Name = DEFAULT_NAME) -> None:
    """Look after a cloud on a cluster, until SIGTERM or Ctrl-C; the cloud goes on.

    Example: isthmus cloud attach --address 10.0.0.1:6379
    """
    from isthmus.cloud.cluster.attached import attach as run

    run(address, name)


def scale(
    workers: Annotated[str, typer.Argument(help="N, or MIN:MAX for as many as the waiting calls need.")],
    address: Address = "auto",
    name: Name = DEFAULT_NAME,
) -> None:
    """Change how many workers a cloud on a cluster has; what is too many is drained first.

    Example: isthmus cloud scale 2:6
    """
    from isthmus.cloud.cluster.attached import scale as run
    from isthmus.common.errors import ConfigError

    least, _, most = workers.partition(":")
    if not least.isdecimal() or not (most or least).isdecimal():
        raise ConfigError(f"{workers!r} is no number of workers: write N, or MIN:MAX")
    run(address, name, int(least), int(most or least))


def stop(
    address: Address = "auto",
    name: Name = DEFAULT_NAME,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that calls in flight get.")] = 30.0,
) -> None:
    """End a cloud on a cluster, once the calls in flight are answered.

    Example: isthmus cloud stop --address 10.0.0.1:6379
    """
    from isthmus.cloud.cluster.attached import stop as run

    if not run(address, name, grace):
        typer.echo(f"stopped after {grace:.0f} s with calls unanswered", err=True)
        raise typer.Exit(UNANSWERED)


def doctor(
    address: Address = "auto",
    name: Name = DEFAULT_NAME,
    home: Home = DEFAULT_HOME,
    model: Annotated[
        str | None, typer.Option(help="The model to look for on each node; by default the cloud's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a cluster for a cloud: Ray's TLS and token, open ports, versions, clocks, keys, the model on each node.

    Ends with exit code 74 where something has to be mended; each finding says how.

    Example: isthmus cloud doctor --address auto --model smollm2-135m
    """
    from isthmus.cloud.cluster.cluster_doctor import examine

    findings = examine(address, name, home.expanduser(), model)
    if as_json:
        typer.echo(json.dumps({"findings": [finding.as_dict() for finding in findings]}))
    else:
        from rich.console import Console

        from isthmus.cloud.cluster.cluster_doctor import view

        Console().print(view(findings))
    if any(not finding.good for finding in findings):
        raise typer.Exit(NOT_WELL)


NOT_WELL = 74  # documented in docs/exit-codes.md


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (issuer, node_keygen, enroll_node, ray_ca, ray_certificate, attach, scale, stop, doctor):
        app.command(rich_help_panel=CLUSTER)(command)
