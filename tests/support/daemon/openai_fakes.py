"""A daemon for OpenAI's API that is real but for what computes: a job's process and an answer do what a test says."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import shutil
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from sqlalchemy import delete
from support.daemon.served import serving

from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.disk_room import DiskRoom
from isthmus.daemon.home import Home
from isthmus.daemon.jobs.job_names import checkpoint_id, result_id
from isthmus.daemon.jobs.job_service import JobService
from isthmus.daemon.jobs.kinds import RESULTS, Work
from isthmus.daemon.jobs.reports import Reporter, write_end
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


class HeldWorker:
    """Stands for a job's process: it computes nothing, and reports and ends as it is told, or as the runner asks.

    Args:
        command: The process's; it ends with the job's folder.
    """

    def __init__(self, command: Sequence[str], **_options: Any) -> None:
        self._folder = Path(command[-1])
        self._work = Work.read(self._folder)
        self.returncode: int | None = None
        self.stdin = self  # the runner closes it to ask for the end

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self.returncode is not None

    def close(self) -> None:
        """Stop, as a process does at its next micro-batch."""
        self.end("stopped")

    def poll(self) -> int | None:
        """0 once it has ended."""
        return self.returncode

    def report(
        self, steps: Sequence[int], total: int | None, speed: float | None, waiting: Mapping[str, Any] | None
    ) -> None:
        """Report some steps, each with a checkpoint, and a cloud that is waited for."""
        with Reporter(self._folder) as reporter:
            for step in steps:
                own, metrics = checkpoint_id(self._work.job, step), {"step": step, "train_loss": 2.0 / step}
                (Path(self._work.models) / own).mkdir()
                reporter.tell("metrics", message=f"step {step}", data=metrics)
                reporter.tell("checkpoint", id=own, step=step, metrics=metrics)
            crossed = dict.fromkeys(("bytes_up", "bytes_down", "calls", "retries"), 0)
            reporter.tell("progress", step=max(steps, default=0), total=total, speed=speed, **crossed)
            if waiting is not None:
                reporter.tell("waiting", **waiting)

    def end(self, outcome: str, **values: Any) -> None:
        """End in some way; with a model and a file of results if that is "succeeded"."""
        if outcome == "succeeded":
            (Path(self._work.models) / result_id(self._work.job)).mkdir()
            (self._folder / RESULTS[self._work.kind][0]).write_text("step\n", encoding="utf-8")
        write_end(self._folder, self._work.attempt, outcome, **values)
        self.returncode = 0


class HeldJobs(JobService):
    """The real jobs and their real runner, whose thread is not started: it takes its turns here.

    A job's process is a `HeldWorker`.
    """

    def go_on(
        self,
        job_id: str,
        *,
        steps: Sequence[int] = (),
        total: int | None = None,
        speed: float | None = None,
        waiting: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin a job, if it has not begun, and let its process report some steps."""
        self._worker(job_id).report(steps, total, speed, waiting)
        self._runner._watch(job_id)

    def end(self, job_id: str, **error: Any) -> None:
        """Let a job's process end: well, or with an error (`code`, `message`)."""
        self._worker(job_id).end("failed" if error else "succeeded", **error, passing=False)
        self._runner._watch(job_id)

    def settle(self) -> None:
        """Take over how processes have ended that were asked to."""
        for job_id, running in list(self._runner._running.items()):
            if running.process.poll() is not None:
                self._runner._watch(job_id)

    def forget(self) -> None:
        """Remove all jobs, with what they have left."""
        self._runner._running.clear()
        with self._database.session() as session:
            for table in (Model, Event, Job):
                session.execute(delete(table))
        for folder in ("jobs", "models"):
            for path in (self._home.path / folder).iterdir():
                shutil.rmtree(path)

    def _worker(self, job_id: str) -> Any:
        if job_id not in self._runner._running:
            with patch("isthmus.daemon.jobs.job_runner.subprocess.Popen", HeldWorker):
                self._runner._begin(job_id)
        return self._runner._running[job_id].process


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
        cloud = {"main": {"cloud": "isthmus://127.0.0.1:1#SHA256:0"}}  # which nothing connects to
        made = DaemonSettings.model_validate({"clouds": cloud, **settings})
        room = DiskRoom(home.path, made.disk_gib)
        self.jobs, self.answers = HeldJobs(made, home, database, room), InstantAnswers()
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
