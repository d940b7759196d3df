"""The command `isthmus cloud status`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.cli.cloud_flags import DEFAULT_HOME, Home


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
        Console().print(shown)
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
