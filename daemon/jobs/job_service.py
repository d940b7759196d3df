"""What the APIs ask of jobs. Every method names the owner who asks; another's job is not found."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Select, and_, func, or_, select
from sqlalchemy.orm import Session

from isthmus.common.errors import ConfigError
from isthmus.common.files import disk_errors
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.disk_room import DiskRoom
from isthmus.daemon.home import Home
from isthmus.daemon.jobs.job_names import MOST_SUFFIX, new_job_id, suffix_of
from isthmus.daemon.jobs.job_rows import ENDED, delete_models, end, forget, forget_oldest, tell
from isthmus.daemon.jobs.job_runner import JobRunner, Patience, Waiting
from isthmus.daemon.jobs.job_specs import make_links, prepare
from isthmus.daemon.jobs.kinds import LOSSES, RUN, TRAINING
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.tables import Event, Job, Model

MOST_WAITING = 1000
"""Jobs of an owner that have not ended."""
MOST_JOBS = 10_000
"""Jobs of an owner; of more, the oldest that has ended goes, and its models stay."""
MOST_PRIORITY = 100
LEAST_ROOM = 16 << 20
"""Bytes that the home must have left for another job."""
SAME_SECONDS = 60.0
"""Within which the same request is the same job."""
EVENT = "ftevent-"

T = TypeVar("T")


class UnknownJobError(LookupError):
    """There is no such job, or it is another owner's."""


class QueueFullError(ConfigError):
    """An owner has as many jobs waiting as may be."""


class WrongStateError(ValueError):
    """A job's state does not allow what is asked of it; the message names the state and what is possible."""


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a job is made of; see `isthmus.daemon.state.tables.Job`."""

    kind: str
    model: str
    spec: Mapping[str, Any]
    request: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    suffix: str = ""


class JobService:
    """Jobs of all owners. Its methods may be called by several threads; `start` and `stop` by one."""

    def __init__(
        self,
        settings: DaemonSettings,
        home: Home,
        database: Database,
        room: DiskRoom,
        patience: Patience | None = None,
    ) -> None:
        self._settings, self._home, self._database = settings, home, database
        self._runner = JobRunner(settings, home, database, room, patience or Patience())
        self._room = room
        self._creating = threading.Lock()

    def start(self) -> None:
        """Begin to work: jobs that a crash has left are taken up again."""
        self._runner.start()

    def stop(self) -> None:
        """Pause the running jobs at their next micro-batch, so that the next start goes on with them."""
        self._runner.stop()

    def create(self, owner: str, new: NewJob) -> Job:
        """Put a job into the queue. The same `request` of the same owner within a minute is the same job.

        A job that has failed or was cancelled in that minute is none: to ask again is to want another one.

        Raises:
            ConfigError: The spec does not make sense, or (`QueueFullError`) too many jobs wait.
            UnknownModelError: No cloud serves the model.
            DiskError: The home is as full as it may be.
        """
        if abs(new.priority) > MOST_PRIORITY:
            raise ConfigError(f"priority = {new.priority}: give {-MOST_PRIORITY} to {MOST_PRIORITY}")
        if len(new.suffix) > MOST_SUFFIX:
            raise ConfigError(f"the suffix has {len(new.suffix)} characters: give at most {MOST_SUFFIX}")
        with self._creating:
            with self._database.reading() as session:
                same = _same_job(session, owner, new)
                if same is not None:
                    return same
                waiting = select(func.count()).select_from(Job).where(Job.owner == owner, Job.status.not_in(ENDED))
                if (session.scalar(waiting) or 0) >= MOST_WAITING:
                    raise QueueFullError(f"{MOST_WAITING} jobs wait already: let some end, or cancel some")
                links = prepare(new.kind, new.model, new.spec, owner, session, self._home, self._settings)
            self._room.room_for(LEAST_ROOM)
            job = self._insert(owner, new, links)
        self._runner.wake()
        return job

    def _insert(self, owner: str, new: NewJob, links: Mapping[str, Path]) -> Job:
        job_id = new_job_id()
        folder = self._home.job(job_id)
        with disk_errors(folder):
            folder.mkdir(mode=0o700)
        try:
            make_links(folder, links)
            with self._database.session() as session:
                forgotten = forget_oldest(session, owner, MOST_JOBS)
                job = Job(
                    id=job_id,
                    owner=owner,
                    kind=new.kind,
                    status="queued",
                    model=new.model,
                    spec=dict(new.spec),
                    request=dict(new.request),
                    labels=dict(new.labels),
                    priority=new.priority,
                    suffix=suffix_of(new.suffix),
                    created_at=time.time(),
                )
                session.add(job)
                session.flush()  # before its first event
                tell(
                    session,
                    job,
                    f"Created fine-tuning job: {job_id}" if new.kind in TRAINING else f"Created job: {job_id}",
                )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if forgotten is not None:
            shutil.rmtree(self._home.job(forgotten), ignore_errors=True)
        return job

    def get(self, owner: str, job_id: str) -> Job:
        """A job. Raises UnknownJobError."""
        with self._database.reading() as session:
            return _job(session, owner, job_id)

    def waiting(self, job: Job) -> Waiting | None:
        """The cloud that a job waits for; None for none."""
        return self._runner.waiting(job.id) if job.status in ("queued", "running") else None

    def list(
        self,
        owner: str,
        *,
        after: str | None = None,
        limit: int = 20,
        labels: Mapping[str, str] | None = None,
        kinds: Collection[str] | None = None,
    ) -> tuple[Sequence[Job], bool]:
        """Jobs, the newest first, from behind `after` on; and whether there are more.

        Args:
            owner: Whose.
            after: The id of the job before the first one; None for the newest.
            limit: So many at most.
            labels: Only jobs that have all of these, perhaps among others; an empty mapping is for those without any.
            kinds: Only jobs of these kinds.

        Raises:
            UnknownJobError: There is no job `after`.
        """
        with self._database.reading() as session:
            query = select(Job).where(Job.owner == owner).order_by(Job.created_at.desc(), Job.id.desc())
            if kinds is not None:
                query = query.where(Job.kind.in_(kinds))
            if after is not None:
                last = _job(session, owner, after)
                same = and_(Job.created_at == last.created_at, Job.id < last.id)
                query = query.where(or_(Job.created_at < last.created_at, same))
            if labels is None:
                return _page(session, query, limit)
            rows = session.scalars(query.execution_options(yield_per=100))
            return _first((job for job in rows if _has(job, labels)), limit)

    def cancel(self, owner: str, job_id: str) -> Job:
        """End a job; it can be retried. Raises UnknownJobError, WrongStateError."""
        return self._change(owner, job_id, _cancel)

    def pause(self, owner: str, job_id: str) -> Job:
        """Let a job rest: at once if it waits, and at its next micro-batch if it runs.

        Raises:
            UnknownJobError: There is no such job.
            WrongStateError: It is neither queued nor running.
        """
        return self._change(owner, job_id, _pause)

    def resume(self, owner: str, job_id: str) -> Job:
        """Put a paused job back into the queue. Raises UnknownJobError, WrongStateError."""
        return self._change(owner, job_id, _resume)

    def retry(self, owner: str, job_id: str) -> Job:
        """Go on with a failed or cancelled job from its newest checkpoint. Raises UnknownJobError, WrongStateError."""

        def retry(session: Session, job: Job) -> None:
            if not self._home.job(job_id).is_dir():
                raise WrongStateError(
                    f"{job_id} ended more than {self._settings.keep_days:g} days ago, and its folder is gone: create "
                    "it anew"
                )
            _require(job, ("failed", "cancelled"), "retried")
            job.status, job.wanted, job.error, job.finished_at = "queued", "run", None, None
            tell(session, job, "The job is queued again")

        return self._change(owner, job_id, retry)

    def delete(self, owner: str, job_id: str) -> None:
        """Remove a job that has ended, with its folder, events, models and results; files that were uploaded stay.

        Raises:
            UnknownJobError: There is no such job.
            WrongStateError: It has not ended.
        """
        with self._runner.lock, self._database.session() as session:
            job = _job(session, owner, job_id)
            _require(job, ENDED, "deleted")
            obsolete = [self._home.job(job_id), *delete_models(session, job, self._home)]
            forget(session, job)
        for path in obsolete:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _change(self, owner: str, job_id: str, change: Callable[[Session, Job], None]) -> Job:
        with self._runner.lock:
            with self._database.session() as session:
                job = _job(session, owner, job_id)
                change(session, job)
            if job.status == "running" and job.wanted != "run":
                self._runner.ask_to_stop(job_id)
            else:
                self._runner.forgive(job_id)
        self._runner.wake()
        return job

    def events(
        self, owner: str, job_id: str, *, after: str | None = None, limit: int = 20
    ) -> tuple[Sequence[Event], bool]:
        """Events, the newest first, as `list`. An event's id is "ftevent-<number>". Raises UnknownJobError."""
        with self._database.reading() as session:
            _job(session, owner, job_id)
            query = select(Event).where(Event.job == job_id).order_by(Event.number.desc())
            if after is not None:
                number = after.removeprefix(EVENT)
                if not number.isdecimal() or len(number) > 18:
                    raise UnknownJobError(f"there is no event {after!r}")
                query = query.where(Event.number < int(number))
            return _page(session, query, limit)

    def checkpoints(
        self, owner: str, job_id: str, *, after: str | None = None, limit: int = 10
    ) -> tuple[Sequence[Model], bool]:
        """Checkpoints that can be talked to, the newest first, as `list`. Raises UnknownJobError."""
        with self._database.reading() as session:
            _job(session, owner, job_id)
            query = select(Model).where(Model.job == job_id, Model.step.is_not(None), Model.deleted.is_(False))
            if after is not None:
                last = session.scalar(select(Model).where(Model.job == job_id, Model.id == after))
                if last is None:
                    raise UnknownJobError(f"there is no checkpoint {after!r}")
                query = query.where(Model.step < last.step)
            return _page(session, query.order_by(Model.step.desc()), limit)

    def steps(self, owner: str, job_id: str, *, after: int = 0, limit: int = 10_000) -> Sequence[Mapping[str, Any]]:
        """Lines of the run's log after step `after`, the oldest first: `step`, `loss`, … Raises UnknownJobError."""
        self.get(owner, job_id)
        path = self._home.job(job_id) / RUN / LOSSES
        found: list[Mapping[str, Any]] = []
        if not path.exists():
            return found
        with path.open(encoding="utf-8") as file:
            for text in file:
                if not text.endswith("\n"):
                    break  # it is being written
                line = json.loads(text)
                if line["step"] > after:
                    found.append(line)
                if len(found) == limit:
                    break
        return found


def _job(session: Session, owner: str, job_id: str) -> Job:
    job = session.get(Job, job_id)
    if job is None or job.owner != owner:
        raise UnknownJobError(f"there is no job {job_id!r}")
    return job


def _same_job(session: Session, owner: str, new: NewJob) -> Job | None:
    if not new.request:
        return None
    recent = select(Job).where(Job.owner == owner, Job.created_at > time.time() - SAME_SECONDS, Job.kind == new.kind)
    for job in session.scalars(recent.where(Job.status.not_in(("failed", "cancelled")))):
        if job.request == dict(new.request):
            return job
    return None


def _cancel(session: Session, job: Job) -> None:
    _require(job, ("queued", "running", "paused"), "cancelled")
    if job.status == "running":
        job.wanted = "cancel"
    else:
        end(session, job, "cancelled", "The job was cancelled")


def _pause(session: Session, job: Job) -> None:
    _require(job, ("queued", "running"), "paused")
    if job.status == "running" and job.wanted == "cancel":
        raise WrongStateError(f"{job.id} is being cancelled, and cannot be paused: retry it when it is")
    if job.status == "running":
        job.wanted = "pause"
    else:
        job.status = "paused"
        tell(session, job, "The job is paused before it has begun" if not job.attempts else "The job is paused")


def _resume(session: Session, job: Job) -> None:
    if job.status == "running" and job.wanted == "pause":
        job.wanted = "run"  # its worker stops, and the next one goes on
        return
    _require(job, ("paused",), "resumed")
    job.status = "queued"
    tell(session, job, "The job is queued again")


def _require(job: Job, allowed: Sequence[str], what: str) -> None:
    if job.status not in allowed:
        states = " or ".join([", ".join(allowed[:-1]), allowed[-1]] if len(allowed) > 1 else allowed)
        raise WrongStateError(f"{job.id} is {job.status} and cannot be {what}: that takes a job that is {states}")


def _has(job: Job, labels: Mapping[str, str]) -> bool:
    return all(job.labels.get(name) == value for name, value in labels.items()) if labels else not job.labels


def _page(session: Session, query: Select[Any], limit: int) -> tuple[Sequence[T], bool]:
    return _first(session.scalars(query.limit(limit + 1)), limit)


def _first(rows: Iterable[T], limit: int) -> tuple[Sequence[T], bool]:
    found: list[T] = []
    for row in rows:
        if len(found) == limit:
            return found, True
        found.append(row)
    return found, False
