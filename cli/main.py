"""The command `isthmus`: composes the parts' commands and turns errors into one line and an exit code.

Nothing here, and nothing that the command modules import at their top, loads torch, transformers, grpc or ray: `isthmus
--help` answers at once.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import sys
from typing import Annotated

import typer

from isthmus.cli.audit_commands import app as audit
from isthmus.cli.bench_commands import bench, demo
from isthmus.cli.cloud_commands import app as cloud
from isthmus.cli.daemon_commands import app as daemon
from isthmus.cli.edge_commands import app as edge
from isthmus.cli.emulator_commands import app as emulator
from isthmus.cli.emulator_edge_commands import app as tuning
from isthmus.cli.jobs_commands import app as jobs
from isthmus.cli.plan_command import plan
from isthmus.cli.research_commands import emulator_scores, experiment
from isthmus.common.errors import DiskError, IsthmusError
from isthmus.common.shutdown import run_to_end
from isthmus.common.terminal import guard_messages, printable

INTERNAL = 1

app = typer.Typer(
    name="isthmus",
    help="Tune a language model whose owner may not show its weights, on data whose owner may not show them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cloud, name="cloud")
edge.add_typer(daemon, name="daemon")
edge.add_typer(jobs, name="jobs")
app.add_typer(edge, name="edge")
emulator.add_typer(tuning)  # without a name: the commands of all three kinds of user stand in one group
emulator.add_typer(emulator_scores)
app.add_typer(emulator, name="emulator")
app.add_typer(bench, name="bench")
app.add_typer(audit, name="audit")
app.add_typer(experiment, name="experiment")
app.command(name="demo")(demo)
app.command(name="plan")(plan)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"isthmus {importlib.metadata.version('isthmus')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Tune a language model whose owner may not show its weights, on data whose owner may not show them."""


def main() -> None:
    """Run the command that this process was started with. Raises SystemExit."""
    try:
        app()
    except IsthmusError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            _internal(error)
        _fail(
            f"the disk is full while writing {error.filename or 'a file'}: free some space and run again",
            DiskError.exit_code,
        )
    except Exception as error:  # noqa: BLE001 - the last line of defence: nobody is shown a traceback unless they ask
        _internal(error)


def _internal(error: Exception) -> None:
    if os.environ.get("ISTHMUS_TRACEBACK"):
        raise error
    _fail(f"internal error: {type(error).__name__}: {error} (set ISTHMUS_TRACEBACK=1 for the traceback)", INTERNAL)


def _fail(message: str, code: int) -> None:
    # Names and contents of files may be a stranger's.
    sys.stderr.write(f"isthmus: {printable(message)}\n")
    sys.stderr.flush()
    sys.exit(code)


def console() -> None:
    """Entry point of the console script."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # our own errors say that a connection was lost
    guard_messages()
    run_to_end(main)


if __name__ == "__main__":
    console()
