"""Options that the commands of the cloud's owner share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Home = Annotated[Path, typer.Option("--home", help="Folder of the cloud's keys, enrolments and state.")]
DEFAULT_HOME = Path("~/.isthmus/cloud")

CLUSTER = "On a Ray cluster"
DEFAULT_NAME = "cloud"
UNANSWERED = 60  # documented in docs/exit-codes.md

RootPassphraseFile = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        help="File that holds the root key's passphrase, or ISTHMUS_ROOT_PASSPHRASE_FILE names it; by default it is "
        "asked for at the terminal.",
    ),
]
WithPassphrase = Annotated[bool, typer.Option(help="Whether a new key has a passphrase.")]
