"""What the handlers of requests work with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from fastapi import Depends, Request

from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.disk_room import DiskRoom
from isthmus.daemon.home import Home
from isthmus.daemon.jobs.job_service import JobService
from isthmus.daemon.serving.answers import Answers
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.owners import FIRST
from isthmus.daemon.state.tables import Owner
from isthmus.daemon.tokens import SignInCode

UNIX_SOCKET = "unix_socket"
"""What the listener of the Unix socket sets in the state of its requests."""


@dataclass
class Noted:
    """What the daemon asks its parts now and then, so that a request for it waits for none of them.

    Attributes:
        answers: `Answers.state`, with `asked_at`; empty before the first time.
    """

    answers: Mapping[str, Any] = field(default_factory=dict)

    def clouds(self, owner: Owner) -> list[dict[str, Any]]:
        """What `answers` has of the clouds. That an answer waits for one just now, only the first owner is told."""
        found = self.answers.get("clouds", ())
        if owner.name == FIRST:
            return [{key: value for key, value in cloud.items() if key != "seen"} for cloud in found]
        return [{"name": cloud["name"], "model": cloud["model"], **cloud["seen"]} for cloud in found]


@dataclass(frozen=True)
class Context:
    """The parts of a running daemon. It is the application's `state.context`.

    Attributes:
        room: How much the home may still take: what is written into it asks before. All parts have this one, since each
            must know what comes to the others.
    """

    settings: DaemonSettings
    home: Home
    database: Database
    jobs: JobService
    answers: Answers
    room: DiskRoom
    noted: Noted = field(default_factory=Noted)
    sign_in: SignInCode = field(default_factory=SignInCode)


async def context_of(request: Request) -> Context:
    """The daemon that a request came to."""
    return cast(Context, request.app.state.context)


async def over_unix_socket(request: Request) -> bool:
    """Whether a request came over the Unix socket: its listener marks its connections. Addresses tell nothing, since a
    connection over the network that was reset has none either."""
    return getattr(request.state, UNIX_SOCKET, False) is True


async def owner_of(request: Request) -> Owner:
    """Whose token a request has; `isthmus.daemon.web.access` has refused those without one."""
    return cast(Owner, request.state.owner)


# All are coroutines: a plain function would wait for a thread.
Here = Annotated[Context, Depends(context_of)]
Asker = Annotated[Owner, Depends(owner_of)]
OverUnixSocket = Annotated[bool, Depends(over_unix_socket)]
