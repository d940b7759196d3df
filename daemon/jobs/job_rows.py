"""Jobs in the database: what their events say, and what a worker's reports become."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import delete, exists, func, select, update
from sqlalchemy.orm import Session

from isthmus.common.files import sha256_of
from isthmus.daemon.home import Home
from isthmus.daemon.jobs.job_names import checkpoint_prefix, model_name, result_file_id, result_id
from isthmus.daemon.jobs.kinds import RESULTS, TRAINING
from isthmus.daemon.state.crossings import COUNTERS, add_traffic
from isthmus.daemon.state.tables import BaseModel, Event, Job, Model, StoredFile

ENDED = ("succeeded", "failed", "cancelled")
MOST_EVENTS = 5000
"""Of a job; the oldest go first."""


def tell(
    session: Session,
    job: Job,
    message: str,
    *,
    level: str = "info",
    kind: str = "message",
    data: Mapping[str, Any] | None = None,
    at: float | None = None,
) -> None:
    """Tell a job's owner something."""
    session.add(
        Event(job=job.id, created_at=at or time.time(), level=level, kind=kind, message=message, data=dict(data or {}))
    )
    session.flush()
    own = Event.job == job.id
    if session.scalar(select(func.count()).select_from(Event).where(own)) > MOST_EVENTS:  # type: ignore[operator]  # never None
        kept = select(Event.number).where(own).order_by(Event.number.desc()).limit(MOST_EVENTS)
        session.execute(delete(Event).where(own, Event.number.not_in(kept)))


def end(session: Session, job: Job, status: str, message: str, error: Mapping[str, Any] | None = None) -> None:
    """A job is over."""
    job.status, job.wanted, job.finished_at = status, "run", time.time()
    job.error = None if error is None else dict(error)
    tell(session, job, message, level="info" if error is None else "error")


def hear(
    session: Session, job: Job, home: Home, reports: Sequence[Mapping[str, Any]], most_checkpoints: int
) -> Sequence[Path]:
    """Put a worker's reports into the database.

    Args:
        most_checkpoints: Checkpoints that can be talked to; of more, those with the fewest steps go.

    Returns:
        The folders that may be removed once the session is committed.
    """
    obsolete: list[Path] = []
    for report in reports:
        match report["kind"]:
            case "progress":
                job.step, job.total, job.speed = report["step"], report["total"], report["speed"]
                _count_traffic(session, job, report)
            case "metrics":
                _add_metrics(session, job, report)
            case "message":
                tell(session, job, report["message"], at=report["at"])
            case "checkpoint":
                obsolete += _add_checkpoint(session, job, home, report)
    return [*obsolete, *_prune(session, job, home, most_checkpoints)]


def keep_result(job: Job, home: Home) -> StoredFile:
    """Link what a job has made to where its owner finds it. Done again, it changes nothing."""
    filename, purpose = RESULTS[job.kind]
    own = result_file_id(job.id, 0)
    made, kept = home.job(job.id) / filename, home.file(own)
    if not kept.exists():
        os.link(made, kept)
    return StoredFile(
        id=own,
        owner=job.owner,
        filename=filename,
        purpose=purpose,
        size=kept.stat().st_size,
        sha256=sha256_of(kept).hex(),
        created_at=time.time(),
    )


def succeed(session: Session, job: Job, home: Home, result: StoredFile) -> None:
    """A job has succeeded, with this result, and with a model if it is one that makes one."""
    session.merge(result)
    job.results = [result.id]
    own = result_id(job.id)
    if job.kind in TRAINING and session.scalar(select(Model).where(Model.id == own)) is None:
        name = model_name(job.model, job.suffix, job.id)
        folder = str(home.model(own).relative_to(home.path))
        session.add(
            Model(name=name, id=own, owner=job.owner, base=job.model, job=job.id, folder=folder, created_at=time.time())
        )
        tell(session, job, f"New fine-tuned model created: {name}")
    end(session, job, "succeeded", "The job has successfully completed")


def orphans(session: Session, job: Job, home: Home) -> Sequence[Path]:
    """Adapters of a job that has ended which no row knows: a crash came between the two."""
    prefix = checkpoint_prefix(job.id)
    known = set(session.scalars(select(Model.id).where(Model.job == job.id)))
    return [path for path in (home.path / "models").glob(f"{prefix}*") if path.name not in known]


def forget_oldest(session: Session, owner: str, most: int) -> str | None:
    """Remove an owner's oldest job that has ended, if there are so many jobs; returns its id. Its models stay."""
    own = Job.owner == owner
    if (session.scalar(select(func.count()).select_from(Job).where(own)) or 0) < most:
        return None
    oldest = select(Job).where(own, Job.status.in_(ENDED)).order_by(Job.created_at, Job.id).limit(1)
    job = session.scalar(oldest)
    if job is None:
        return None
    forget(session, job)
    return job.id


def forget(session: Session, job: Job) -> None:
    """Remove a job and its events. Its models stay."""
    session.execute(update(Model).where(Model.job == job.id).values(job=None))
    session.execute(delete(Event).where(Event.job == job.id))
    session.delete(job)


def delete_models(session: Session, job: Job, home: Home) -> Sequence[Path]:
    """Delete what a job has made: its models and its results. Returns what may be removed once that is committed."""
    models = session.scalars(select(Model).where(Model.job == job.id, Model.deleted.is_(False))).all()
    for model in models:
        model.deleted = True
    session.execute(delete(StoredFile).where(StoredFile.id.in_(job.results)))
    return [*(home.path / model.folder for model in models), *(home.file(result) for result in job.results)]


def _count_traffic(session: Session, job: Job, report: Mapping[str, Any]) -> None:
    job.bytes_up += report["bytes_up"]
    job.bytes_down += report["bytes_down"]
    base = session.get(BaseModel, job.model) if any(report[name] for name in COUNTERS) else None
    if base is not None:
        add_traffic(session, base.cloud, report, report["at"])


def _add_metrics(session: Session, job: Job, report: Mapping[str, Any]) -> None:
    # After a crash some steps are made again, and their figures are the same.
    known = exists().where(Event.job == job.id, Event.kind == "metrics", Event.message == report["message"])
    if not session.scalar(select(known)):
        tell(session, job, report["message"], kind="metrics", data=report["data"], at=report["at"])


def _add_checkpoint(session: Session, job: Job, home: Home, report: Mapping[str, Any]) -> list[Path]:
    own, step = report["id"], report["step"]
    folder = home.model(own)
    known = session.scalar(select(Model).where(Model.id == own))
    if known is not None:  # it was made again after a crash
        return [folder] if known.deleted else []
    if not folder.is_dir():
        return []
    session.add(
        Model(
            name=model_name(job.model, job.suffix, job.id, step),
            id=own,
            owner=job.owner,
            base=job.model,
            job=job.id,
            step=step,
            metrics=report["metrics"],
            folder=str(folder.relative_to(home.path)),
            created_at=report["at"],
        )
    )
    tell(session, job, f"Checkpoint created at step {step}", at=report["at"])
    return []


def _prune(session: Session, job: Job, home: Home, most: int) -> list[Path]:
    session.flush()
    kept = select(Model).where(Model.job == job.id, Model.step.is_not(None), Model.deleted.is_(False))
    old = session.scalars(kept.order_by(Model.step.desc()).offset(most)).all()
    for model in old:
        model.deleted = True
    return [home.path / model.folder for model in old]
