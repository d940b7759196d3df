"""What the handlers of requests work with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.home import Home
from isthmus.daemon.jobs.job_service import JobService
from isthmus.daemon.serving.answers import Answers
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.tables import Owner


@dataclass(frozen=True)
class Context:
    """The parts of a running daemon. It is the application's `state.context`."""

    settings: DaemonSettings
    home: Home
    database: Database
    jobs: JobService
    answers: Answers


def context_of(request: Request) -> Context:
    """The daemon that a request came to."""
    return cast(Context, request.app.state.context)


def owner_of(request: Request) -> Owner:
    """Whose token a request has; `isthmus.daemon.web.access` has refused those without one."""
    return cast(Owner, request.state.owner)


Here = Annotated[Context, Depends(context_of)]
Asker = Annotated[Owner, Depends(owner_of)]
