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
