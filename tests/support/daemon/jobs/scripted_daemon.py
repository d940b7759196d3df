"""A daemon without answers, whose jobs do what their data say (`support.daemon.jobs.scripted_worker`).

Run as a program with a home, it serves on a free port, with what standard input says as daemon.toml. It knows the model
"tiny" of the cloud "main".
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from support.daemon import daemon_parts
from support.daemon.daemon_parts import NoAnswers
from support.daemon.jobs import scripted_worker

from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.disk_room import DiskRoom
from isthmus.daemon.home import Home
from isthmus.daemon.jobs.job_service import JobService
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.owners import first_owner
from isthmus.daemon.state.tables import BaseModel
from isthmus.daemon.web.context import Context

CLOUD = '[clouds.main]\ncloud = "isthmus://localhost:1#SHA256:0"\n'


def with_jobs(settings: DaemonSettings, home: Home) -> Context:
    """As the server's `make_context` makes them, but for answers."""
    database = Database(home.database)
    first_owner(database, home.token)
    with database.session() as session:
        session.merge(BaseModel(name="tiny", cloud="main", facts={}, seen_at=0.0))
    room = DiskRoom(home.path, settings.disk_gib)
    jobs = JobService(settings, home, database, room)
    return Context(settings, home, database, jobs, NoAnswers(), room)  # type: ignore[arg-type]


def main(place: str) -> None:
    """Serve, and say where."""
    popen = subprocess.Popen

    def started(words: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return popen([sys.executable, scripted_worker.__file__, words[-1]], **options)

    subprocess.Popen = started  # type: ignore[misc,assignment]
    daemon_parts.main(place, with_jobs)


if __name__ == "__main__":
    main(sys.argv[1])
