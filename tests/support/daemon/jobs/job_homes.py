"""A daemon's jobs against a cloud of the tests: rows that it needs, and waiting for what becomes of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.cloud.train_runs import Runs

from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.disk_room import DiskRoom
from isthmus.daemon.home import Home
from isthmus.daemon.jobs.job_runner import Patience
from isthmus.daemon.jobs.job_service import JobService, NewJob
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.tables import BaseModel, Job, Owner, StoredFile
from isthmus.edge.config.client_config import ClientConfig

TRAINING: dict[str, Any] = {
    "steps": 4, "batch": 2, "accumulate": 2, "learning_rate": 1e-2, "rank": 2, "threads": 1, "validation_split": 0.1,
}  # fmt: skip
"""A training of four steps."""
SECONDS = 60.0


class Jobs:
    """A home with two owners, "one" and "two", whose texts are an uploaded file of the first, `file-texts`.

    Args:
        folder: The home's.
        cloud: The connection string of a cloud, and the edge's key.
        client: Further settings of the connection.
        settings: Of the daemon, besides the cloud.
    """

    def __init__(
        self, folder: Path, cloud: tuple[str, Path], texts: Path, client: dict[str, Any] | None = None, **settings: Any
    ) -> None:
        self.home = Home.make(folder)
        self.database = Database(self.home.database)
        address, key = cloud
        values = {"cloud": address, "key": key, "give_up_after": 1.0, **(client or {})}
        self.settings = DaemonSettings(clouds={"main": ClientConfig.model_validate(values)}, **settings)
        self.room = DiskRoom(self.home.path, self.settings.disk_gib)
        with self.database.session() as session:
            for name in ("one", "two"):
                session.merge(Owner(id=name, name=name, token_sha256=name, created_at=0.0))
            session.flush()
            session.merge(BaseModel(name="tiny", cloud="main", facts={}, seen_at=0.0))
        if not self.home.file("file-texts").exists():
            self.upload("file-texts", texts)

    def upload(self, file_id: str, source: Path, owner: str = "one") -> None:
        """Store a file."""
        data = source.read_bytes()
        self.home.file(file_id).write_bytes(data)
        with self.database.session() as session:
            session.merge(
                StoredFile(
                    id=file_id, owner=owner, filename=source.name, purpose="fine-tune", size=len(data), sha256="",
                    created_at=0.0,
                )
            )  # fmt: skip

    @contextmanager
    def service(self, patience: Patience | None = None) -> Iterator[JobService]:
        """A service that runs while the block does."""
        service = JobService(self.settings, self.home, self.database, self.room, patience)
        service.start()
        try:
            yield service
        finally:
            service.stop()


def jobs_of(folder: Path, runs: Runs, **settings: Any) -> Jobs:
    """Jobs against the cloud of the runs, with their texts."""
    return Jobs(folder, (runs.server.address, runs.server.home.key_file), runs.texts, **settings)


def training(**values: Any) -> NewJob:
    """A training of four steps."""
    return NewJob("train", "tiny", {"data": "file-texts", **TRAINING, **values})


def until(service: JobService, job_id: str, happened: Callable[[Job], bool], owner: str = "one") -> Job:
    """Wait for something to be so of a job, which is looked at again and again."""
    deadline = time.monotonic() + SECONDS
    while True:
        job = service.get(owner, job_id)
        if happened(job):
            return job
        assert time.monotonic() < deadline, (job.status, job.error, said(service, job_id, owner))
        time.sleep(0.02)


def ended(service: JobService, job_id: str, owner: str = "one") -> Job:
    """Wait for a job's end."""
    return until(service, job_id, lambda job: job.status in ("succeeded", "failed", "cancelled"), owner)


def said(service: JobService, job_id: str, owner: str = "one") -> list[str]:
    """What a job's owner was told, the oldest first."""
    return [event.message for event in reversed(service.events(owner, job_id, limit=1000)[0])]
