"""Does something with a home, and is killed between the disk and the database.

    python -m support.daemon.killed_between HOME WHAT

Each function of `BETWEEN` is the daemon's own code. It is killed where it begins to write rows, or, where it forgets
something, where it begins to remove what the rows were of.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from support.daemon.daemon_parts import make_parts

from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.home import Home
from isthmus.daemon.jobs.job_runner import JobRunner, Patience
from isthmus.daemon.jobs.job_service import JobService, NewJob
from isthmus.daemon.openai import file_routes
from isthmus.daemon.openai.upload_stream import UploadStream
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.tables import BaseModel, Job, Owner, StoredFile, TinkerModel, TinkerSession, TinkerWeights
from isthmus.daemon.tinker.promises import NewPromise, Promises
from isthmus.daemon.tinker.saved_weights import SavedWeights
from isthmus.daemon.tinker.tinker_service import TinkerService
from isthmus.daemon.web.context import Context

OWNER = "one"
CLOUDS = {"main": {"cloud": "isthmus://localhost:1#SHA256:0"}}
BODY = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b\r\nContent-Disposition: form-data; '
BODY += b'name="file"; filename="x"\r\n\r\nbytes\r\n--b--\r\n'


def rows(database: Database) -> None:
    """What the functions need: an owner, a base model, a file, and for Tinker's API a session and two models."""
    times = {"created_at": 0.0, "seen_at": 0.0}
    with database.session() as session:
        session.add(Owner(id=OWNER, name=OWNER, token_sha256=OWNER, created_at=0.0))
        session.add(BaseModel(name="tiny", cloud="main", facts={}, seen_at=0.0))
        session.flush()
        file = {"owner": OWNER, "filename": "x", "purpose": "fine-tune", "size": 1, "sha256": "", "created_at": 0.0}
        session.add(StoredFile(id="file-texts", **file))
        session.add(TinkerSession(id="s", owner=OWNER, **times))
        session.flush()
        model = {"owner": OWNER, "session": "s", "base": "tiny", "settings": {}, "created_at": 0.0}
        session.add(TinkerModel(id="s:train:1", seen_at=1e12, **model))
        session.add(TinkerModel(id="s:train:2", seen_at=0.0, **model))


def file(context: Context) -> None:
    temporary = context.home.uploads / "file-new"
    with temporary.open("xb") as opened:
        received = UploadStream("multipart/form-data; boundary=b", opened, 1000)
        received.write(BODY)
        received.finish()
    _killed_at(Database, "session")
    file_routes._keep(context, OWNER, "file-new", temporary, received)


def job(context: Context) -> None:
    jobs = JobService(context.settings, context.home, context.database, context.room)
    _killed_at(Database, "session")
    jobs.create(OWNER, NewJob("train", "tiny", {"data": "file-texts", "steps": 4}))


def model(context: Context) -> None:
    """A checkpoint of which a job's process had not told, when the job was cancelled."""
    runner = JobRunner(context.settings, context.home, context.database, context.room, Patience())
    with context.database.session() as session:
        own = Job(id="ftjob-x", owner=OWNER, kind="train", status="running", model="tiny", spec={}, created_at=0.0)
        own.wanted = "cancel"
        session.add(own)
    context.home.job("ftjob-x").mkdir()
    context.home.model("ftckpt-x-20").mkdir()
    _killed_at(shutil, "rmtree")
    runner._settle("ftjob-x")


def trained(context: Context) -> None:
    context.home.tinker_model("s:train:2").mkdir()
    service = TinkerService(context)
    _killed_at(shutil, "rmtree")
    service.sweep()


def request(context: Context) -> None:
    promises = Promises(context.database, context.home)
    _killed_at(Database, "session")
    promises.make(NewPromise(OWNER, "model/s:train:1", "1", "forward_backward", "s:train:1", body=b"data"))


def weights(context: Context) -> None:
    saved = SavedWeights(context.database, context.home)
    folder = context.home.tinker_weights("req-gone")
    folder.mkdir()
    with context.database.session() as session:
        session.add(
            TinkerWeights(
                path="tinker://s:train:1/weights/x", owner=OWNER, model="s:train:1", kind="weights",
                folder=str(folder.relative_to(context.home.path)), size=0, created_at=0.0,
            )
        )  # fmt: skip
    _killed_at(shutil, "rmtree")
    saved.delete(OWNER, "tinker://s:train:1/weights/x")


BETWEEN: dict[str, Callable[[Context], None]] = {
    "files": file,
    "jobs": job,
    "models": model,
    "tinker/models": trained,
    "tinker/requests": request,
    "tinker/weights": weights,
}
"""By the folder in which each leaves what no row knows."""


def _killed_at(place: Any, name: str) -> None:
    def killed(*_: Any, **__: Any) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    setattr(place, name, killed)


async def _run(home: Home, what: str) -> None:
    context = make_parts(DaemonSettings.model_validate({"clouds": CLOUDS}), home)
    BETWEEN[what](context)


if __name__ == "__main__":
    asyncio.run(_run(Home.make(Path(sys.argv[1])), sys.argv[2]))
