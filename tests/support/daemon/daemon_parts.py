"""A daemon without jobs and answers: real settings, home, database and doors.

Run as a program with a home, it serves on a free port, with what standard input says as daemon.toml.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from isthmus.daemon import daemon_server as server
from isthmus.daemon.daemon_log import logging_to
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.disk_room import DiskRoom
from isthmus.daemon.home import Home
from isthmus.daemon.jobs.job_service import JobService
from isthmus.daemon.serving.answers import Answers
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.owners import first_owner
from isthmus.daemon.web.context import Context


class NoJobs:
    """Jobs that nobody has."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")


class NoAnswers:
    """A process that answers nothing."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def look(self) -> None:
        self.calls.append("look")

    async def state(self) -> Mapping[str, Any]:
        self.calls.append("state")
        return {"pid": None}

    async def stop(self) -> None:
        self.calls.append("stop")


def make_parts(settings: DaemonSettings, home: Home) -> Context:
    """As `server.make_context` makes them, but for jobs and answers."""
    database = Database(home.database)
    first_owner(database, home.token)
    room = DiskRoom(home.path, settings.disk_gib)
    return Context(settings, home, database, cast(JobService, NoJobs()), cast(Answers, NoAnswers()), room)


def main(place: str, make: Callable[[DaemonSettings, Home], Context] = make_parts) -> None:
    """Serve, and say where."""
    settings = DaemonSettings.model_validate({"listen": "127.0.0.1:0", **tomllib.loads(sys.stdin.read())})
    home = Home.make(Path(place))
    with logging_to(home.log, to_stderr=False):
        server.run(settings, home, lambda started: print(started.url, flush=True), make)
    print("ended", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
