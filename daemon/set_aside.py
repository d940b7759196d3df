"""What the home has that its database does not know: a start moves it aside, and a later one removes it.

A kill between putting something into the home and committing its row, or between forgetting a row and removing what it
was of, leaves what nobody finds any more. It counts against `disk_gib` all the same. An older database that was put
back knows less than the home has, so nothing is deleted here before `keep_days`.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from isthmus.common.files import disk_errors
from isthmus.common.ownership import private_folder
from isthmus.daemon.home import SET_ASIDE, Home
from isthmus.daemon.jobs.job_names import checkpoint_prefix, result_file_id, result_id
from isthmus.daemon.jobs.job_rows import ENDED
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.tables import Job, Model, StoredFile, TinkerModel, TinkerPromise, TinkerWeights

_FOLDERS = ("files", "jobs", "models", "tinker/models", "tinker/requests", "tinker/weights")
_TIME = "%Y-%m-%dT%H-%M-%S.%fZ"
_DAY = 86_400.0

log = logging.getLogger(__name__)


def move_unknown(home: Home, database: Database) -> list[Path]:
    """Move what no row of the database knows to `set-aside/TIME/`, each under its path in the home.

    Only for a daemon that has the home, before its parts work. What belongs to a job that has not ended stays, since
    that job's next process goes on with it.

    Returns:
        Where it was.

    Raises:
        DiskError: It cannot be moved.
    """
    with database.reading() as session:
        known = set(_known(session, home))
        under_way = list(_names_under_way(session))
    unknown = [
        path
        for name in _FOLDERS
        for path in sorted((home.path / name).iterdir())
        if path not in known and not any(name in path.name for name in under_way)
    ]
    if unknown:
        aside = datetime.now(UTC).strftime(_TIME)
        with disk_errors(home.set_aside):
            for path in unknown:
                place = path.relative_to(home.path)
                path.rename(private_folder(home.path, SET_ASIDE, aside, *place.parent.parts) / path.name)
        log.warning(
            "moved %d files and folders that the database does not know to %s: the guide says what they may be",
            len(unknown),
            home.set_aside / aside,
        )
    return unknown


def remove_old(home: Home, keep_days: float, now: float | None = None) -> None:
    """Remove what was moved aside more than `keep_days` ago. What has another name is its owner's, and stays."""
    if not home.set_aside.exists():
        return
    before = (time.time() if now is None else now) - keep_days * _DAY
    for folder in home.set_aside.iterdir():
        try:
            moved = datetime.strptime(folder.name, _TIME).replace(tzinfo=UTC)
        except ValueError:
            continue
        if moved.timestamp() < before:
            shutil.rmtree(folder, ignore_errors=True)
            log.info("removed %s after %g days", folder, keep_days)


def _known(session: Session, home: Home) -> Iterator[Path]:
    """The paths that rows know."""
    yield from map(home.file, session.scalars(select(StoredFile.id)))
    yield from map(home.job, session.scalars(select(Job.id)))
    for folder in session.scalars(select(Model.folder).where(Model.deleted.is_(False))):
        yield home.path / folder
    yield from map(home.tinker_model, session.scalars(select(TinkerModel.id)))
    for folder in session.scalars(select(TinkerWeights.folder)):
        yield home.path / folder
    for promise_id, answered in session.execute(select(TinkerPromise.id, TinkerPromise.answer.is_not(None))):
        yield home.tinker_request(promise_id)
        if not answered:
            yield home.tinker_weights(promise_id)  # it is saved anew


def _names_under_way(session: Session) -> Iterator[str]:
    """What jobs make that have not ended, by a part of its name: its rows come once the job's process is heard."""
    for job_id in session.scalars(select(Job.id).where(Job.status.not_in(ENDED))):
        yield from (checkpoint_prefix(job_id), result_id(job_id), result_file_id(job_id, 0))
