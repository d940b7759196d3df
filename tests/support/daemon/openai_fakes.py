"""A daemon for OpenAI's API: real doors, database and routes; jobs and answers that do what a test says, at once."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import shutil
import threading
import time
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import delete, select
from support.daemon.served import serving

from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.disk_room import DiskRoom
from isthmus.daemon.home import Home
from isthmus.daemon.jobs.job_service import JobService, NewJob, UnknownJobError, WrongStateError
from isthmus.daemon.openai import openai_routes
from isthmus.daemon.serving.answers import Answers, BusyError, Piece, Prompt, Sampling, Target, TokenChance
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.owners import first_owner, give_token
from isthmus.daemon.state.tables import BaseModel, Event, Job, Model, StoredFile
from isthmus.daemon.web.application import application
from isthmus.daemon.web.context import Context
from isthmus.daemon.workers.asking import WorkerError

BASE = "house/tiny"
WORDS = ("Once", " upon", " a", " time", " there", " was", " a", " daemon")


class InstantAnswers(Answers):
    """Answers with the words above, and ends as the prompt says.

    A prompt with "busy" finds that too many wait; with "long", that it is too long; with "away", that the cloud is
    away; with "breaks", the worker fails after two words; with "defect", so does this class; with "stays", it waits
    after two words until it is closed; with "gone", its adapter is removed before it is read.
    """

    def __init__(self) -> None:
        self.owners: list[str] = []
        self.asked: list[tuple[Target, Prompt, Sampling]] = []
        self.closed = threading.Semaphore(0)

    async def generate(
        self, target: Target, prompt: Prompt, sampling: Sampling, *, owner: str = ""
    ) -> AsyncGenerator[Piece, None]:
        """Eight words for each answer, or fewer."""
        self.asked.append((target, prompt, sampling))
        self.owners.append(owner)
        text = str(prompt)
        if "busy" in text:
            raise BusyError
        if "long" in text:
            raise WorkerError("the prompt has 9000 tokens, more than the window of 2048: shorten it", 10)
        if "gone" in text:
            shutil.rmtree(target.adapter or "")
            raise WorkerError("the adapter cannot be read", 23)
        if "away" in text:
            raise WorkerError("the cloud cannot be reached", 40)
        size = min(sampling.max_tokens or len(WORDS), len(WORDS))
        whole = size == len(WORDS)
        try:
            for at, word in enumerate(WORDS[:size]):
                for index in range(sampling.n):
                    if at == 2 and "breaks" in text:
                        raise WorkerError("the worker has no more memory", 42)
                    if at == 2 and "defect" in text:
                        raise RuntimeError("a secret")
                    if at == 2 and "stays" in text:
                        await asyncio.Event().wait()
                    yield Piece(
                        index,
                        word,
                        [at + 10],
                        [_chance(at + 10, word, sampling.top_logprobs)] if sampling.logprobs else (),
                        ("stop" if whole else "length") if at == size - 1 else None,
                        prompt_tokens=None if at else 5,
                    )
        finally:
            self.closed.release()

    async def state(self) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    async def stop(self) -> None:
        """There is nothing to stop."""


def _chance(token: int, text: str, n_top: int) -> TokenChance:
    others = [(token + rank, f"~{rank}", b"\xe2\x82" if rank == 1 else b"~%d" % rank, -1.5 - rank)
              for rank in range(1, n_top + 1)]  # fmt: skip
    return TokenChance(token, text, text.encode(), -0.25, others)


class HeldJobs(JobService):
    """Jobs that run when `go_on` says so."""

    def __init__(self, home: Home, database: Database) -> None:
        self._home, self._database = home, database

    def start(self) -> None:
        """Nothing runs by itself."""

    def stop(self) -> None:
        """Nothing runs by itself."""

    def create(self, owner: str, new: NewJob) -> Job:
        """A job that waits."""
        now = time.time()
        with self._database.session() as session:
            recent = session.scalars(select(Job).where(Job.owner == owner, Job.created_at > now - 60))
            for job in recent:
                if job.request == dict(new.request):
                    return job
            job = Job(
                id=f"ftjob-{secrets.token_hex(12)}", owner=owner, kind=new.kind, status="queued", model=new.model,
                spec=dict(new.spec), request=dict(new.request), labels=dict(new.labels), suffix=new.suffix,
                created_at=now, results=[],
            )  # fmt: skip
            session.add(job)
            session.flush()
            session.add(_event(job.id, "the job waits for its turn"))
            session.flush()
            return job

    def get(self, owner: str, job_id: str) -> Job:
        """A job."""
        with self._database.reading() as session:
            job = session.get(Job, job_id)
        if job is None or job.owner != owner:
            raise UnknownJobError(f"there is no job {job_id!r}")
        return job

    def list(
        self,
        owner: str,
        *,
        after: str | None = None,
        limit: int = 20,
        labels: Mapping[str, str] | None = None,
        kinds: Collection[str] | None = None,
    ) -> tuple[Sequence[Job], bool]:
        """Jobs, the newest first."""
        with self._database.reading() as session:
            jobs = list(session.scalars(select(Job).where(Job.owner == owner).order_by(Job.created_at.desc())))
        jobs = [job for job in jobs if kinds is None or job.kind in kinds]
        if labels is not None:
            jobs = [job for job in jobs if (labels.items() <= job.labels.items() if labels else not job.labels)]
        return _page(jobs, [job.id for job in jobs], after, limit)

    def cancel(self, owner: str, job_id: str) -> Job:
        """End a job."""
        return self._move(owner, job_id, ("queued", "running", "paused"), "cancelled")

    def pause(self, owner: str, job_id: str) -> Job:
        """Pause a job."""
        return self._move(owner, job_id, ("queued", "running"), "paused")

    def resume(self, owner: str, job_id: str) -> Job:
        """Let a job wait again."""
        return self._move(owner, job_id, ("paused",), "queued")

    def events(
        self, owner: str, job_id: str, *, after: str | None = None, limit: int = 20
    ) -> tuple[Sequence[Event], bool]:
        """Events, the newest first."""
        self.get(owner, job_id)
        with self._database.reading() as session:
            events = list(session.scalars(select(Event).where(Event.job == job_id).order_by(Event.number.desc())))
        return _page(events, [f"ftevent-{event.number}" for event in events], after, limit)

    def checkpoints(
        self, owner: str, job_id: str, *, after: str | None = None, limit: int = 10
    ) -> tuple[Sequence[Model], bool]:
        """Checkpoints, the newest first."""
        self.get(owner, job_id)
        with self._database.reading() as session:
            of_job = select(Model).where(Model.job == job_id, Model.step.is_not(None), Model.deleted.is_(False))
            models = list(session.scalars(of_job.order_by(Model.step.desc())))
        return _page(models, [model.id for model in models], after, limit)

    def go_on(self, job_id: str, *, steps: Sequence[int] = (), status: str = "running", **columns: Any) -> None:
        """Let a job have checkpoints at some steps, and be in a state; "succeeded" makes its model."""
        with self._database.session() as session:
            job = session.get_one(Job, job_id)
            for step in steps:
                session.add(self._model(job, step))
                session.add(_event(job_id, f"step {step}", {"step": step, "train_loss": 2.0 / step}))
            if status == "succeeded":
                session.add(self._model(job, None))
                job.finished_at = time.time()
            job.status = status
            for name, value in columns.items():
                setattr(job, name, value)

    def result_name(self, job_id: str) -> str:
        """The name of the model that a job has made."""
        with self._database.reading() as session:
            return session.scalars(select(Model.name).where(Model.job == job_id, Model.step.is_(None))).one()

    def forget(self, keep: Collection[str] = ()) -> None:
        """Remove all jobs but some, with what they have left."""
        with self._database.session() as session:
            session.execute(delete(Model).where(Model.job.not_in(list(keep))))
            session.execute(delete(Job).where(Job.id.not_in(list(keep))))

    def _move(self, owner: str, job_id: str, from_: Collection[str], to: str) -> Job:
        self.get(owner, job_id)
        with self._database.session() as session:
            job = session.get_one(Job, job_id)
            if job.status not in from_:
                raise WrongStateError(f"the job is {job.status}: only {', '.join(from_)} ones can become {to}")
            job.status = to
            job.finished_at = time.time() if to == "cancelled" else None
            session.add(_event(job_id, f"the job is {to}"))
            return job

    def _model(self, job: Job, step: int | None) -> Model:
        name = ":".join(["ft", job.model, "", job.suffix, job.id.removeprefix("ftjob-")])
        folder = self._home.model(f"{job.id}-{step}")
        folder.mkdir()
        return Model(
            name=name if step is None else f"{name}:ckpt-step-{step}",
            id=f"{job.id}-result" if step is None else f"ftckpt-{job.id}-{step}",
            owner=job.owner, base=job.model, job=job.id, step=step, folder=str(folder.relative_to(self._home.path)),
            metrics={} if step is None else {"step": step, "train_loss": 2.0 / step, "valid_loss": None},
            created_at=time.time(),
        )  # fmt: skip


def _event(job: str, message: str, data: dict[str, Any] | None = None) -> Event:
    kind = "message" if data is None else "metrics"
    return Event(job=job, created_at=time.time(), level="info", kind=kind, message=message, data=data or {})


def _page(rows: Sequence[Any], ids: Sequence[str], after: str | None, limit: int) -> tuple[Sequence[Any], bool]:
    if after is not None and after not in ids:
        raise UnknownJobError(after)
    rows = rows[ids.index(after) + 1 :] if after is not None else rows
    return rows[:limit], len(rows) > limit


class OpenAIDaemon:
    """A daemon of the parts above, which knows one base model.

    Args:
        folder: For its home.
        settings: Of daemon.toml.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        home = Home.make(folder)
        database = Database(home.database)
        self.owner = first_owner(database, home.token)
        self.token = home.token.read_text(encoding="utf-8").strip()
        self.others_token = give_token(database, "other")
        self.jobs, self.answers = HeldJobs(home, database), InstantAnswers()
        made = DaemonSettings.model_validate(settings)
        room = DiskRoom(home.path, made.disk_gib)
        self.context = Context(made, home, database, self.jobs, self.answers, room)
        self.app = application(self.context, [openai_routes.router()])
        facts = {"digest": "0", "longest": 256, "chat_template": True}
        with database.session() as session:
            session.add(BaseModel(name=BASE, cloud="main", facts=facts, seen_at=time.time()))

    def add_file(self, data: bytes) -> str:
        """A file for fine-tuning, of the first owner; gives its id."""
        file_id = f"file-{secrets.token_hex(12)}"
        self.context.home.file(file_id).write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        with self.context.database.session() as session:
            session.add(
                StoredFile(id=file_id, owner=self.owner.id, filename="a.jsonl", purpose="fine-tune", size=len(data),
                           sha256=sha256, created_at=time.time(), examples=data.count(b"\n"),
                           chats=b'"messages"' in data)
            )  # fmt: skip
        return file_id

    @contextmanager
    def served(self) -> Iterator[str]:
        """Serve on a free port of loopback; gives the base URL of OpenAI's clients."""
        with serving(self.app) as url:
            yield f"{url}/v1"
