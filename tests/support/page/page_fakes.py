"""A daemon for the page: real doors, database and page; jobs, files and answers that do what a test says."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import uvicorn
from fastapi import APIRouter, Request, UploadFile
from fastapi.responses import StreamingResponse

from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.disk_room import DiskRoom
from isthmus.daemon.home import Home
from isthmus.daemon.jobs.job_service import JobService
from isthmus.daemon.page import page_routes
from isthmus.daemon.serving.answers import Answers
from isthmus.daemon.state.crossings import note_adapters
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.owners import FIRST, first_owner
from isthmus.daemon.state.tables import BaseModel, Model, Owner, Traffic
from isthmus.daemon.web.api_error import ApiError
from isthmus.daemon.web.application import application
from isthmus.daemon.web.context import Context

BASE = "smollm2-135m"
TOTAL = 40
WORDS = "The ticket asks for a refund of the second charge. "


def make_context(folder: Path, **settings: Any) -> tuple[Context, str]:
    """The parts of a daemon whose jobs and answers are nobody's, and its first owner's token."""
    home = Home.make(folder)
    database = Database(home.database)
    first_owner(database, home.token)
    made = DaemonSettings.model_validate({"clouds": {"main": {"cloud": "isthmus://c:1#SHA256:x"}}, **settings})
    context = Context(
        made, home, database, cast(JobService, None), cast(Answers, None), DiskRoom(home.path, made.disk_gib)
    )
    return context, home.token.read_text(encoding="utf-8").strip()


class FakeDaemon:
    """Jobs that go on when `advance` says so.

    Attributes:
        slow: Seconds between two words of an answer.
        form: Of the examples that tuned models were tuned on.
        finish: Why answers end.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.context, self.token = make_context(folder, **settings)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.steps: dict[str, list[dict[str, Any]]] = {}
        self.events: dict[str, list[dict[str, Any]]] = {}
        self.saved: dict[str, list[dict[str, Any]]] = {}
        self.files: list[dict[str, Any]] = []
        self.bases = [BASE]
        self.asked: list[dict[str, Any]] = []
        self.slow = 0.01
        self.form, self.finish = "messages", "stop"
        self.url = ""
        self._numbers = itertools.count(1)

    def know_cloud(self) -> None:
        """Have seen what the cloud serves, and some traffic."""
        with self.context.database.session() as session:
            facts = {"plan": "2:2", "n_layers": 30}
            session.merge(BaseModel(name=BASE, cloud="main", facts=facts, seen_at=time.time()))
        there = {"reachable": True, "error": None, "since": None}
        self.context.noted.answers = {"clouds": [{"name": "main", "model": BASE, "seen": there} | there]}
        self.cross(12_345_678, 11_222_333, 84)

    def put_adapter(self, place: str) -> None:
        """Have an adapter of the owner's at a place of `PLACES`."""
        with self.context.database.session() as session:
            note_adapters(session, session.query(Owner).one().id, place)

    def add_adapter(self, files: dict[str, bytes], name: str = f"ft:{BASE}::tickets:0") -> str:
        """Have an adapter of the first owner's; returns its name."""
        folder = self.context.home.model("ftmodel-0")
        folder.mkdir()
        for place, content in files.items():
            (folder / place).write_bytes(content)
        with self.context.database.session() as session:
            (owner,) = session.query(Owner).filter(Owner.name == FIRST)
            place = str(folder.relative_to(self.context.home.path))
            session.add(Model(name=name, id="0", owner=owner.id, base=BASE, folder=place, created_at=time.time()))
        return name

    def cross(self, up: int, down: int, calls: int) -> None:
        """Let so much more have crossed today."""
        day = time.strftime("%Y-%m-%d", time.gmtime())
        with self.context.database.session() as session:
            row = session.get(Traffic, ("main", day))
            if row is None:
                row = Traffic(cloud="main", day=day, bytes_up=0, bytes_down=0, calls=0, retries=0)
                session.add(row)
            row.bytes_up, row.bytes_down, row.calls = row.bytes_up + up, row.bytes_down + down, row.calls + calls

    def add_job(self, body: dict[str, Any]) -> dict[str, Any]:
        """A new job, in the queue."""
        number = next(self._numbers)
        job = {
            **{"id": f"ftjob-{number:024d}", "kind": body["kind"], "status": "queued", "wanted": "run", "priority": 0},
            **{"model": body["model"], "suffix": body.get("suffix", ""), "spec": body.get("spec", {}), "labels": {}},
            **{"created_at": time.time(), "started_at": None, "finished_at": None, "step": 0, "total": None},
            **{"seconds_per_step": None, "seconds_left": None, "error": None, "results": [], "attempts": 0},
            **{"tuned_model": None, "bytes_up": 0, "bytes_down": 0},
        }
        name = job["id"]
        self.jobs[name], self.steps[name], self.events[name], self.saved[name] = job, [], [], []
        self.tell(name, "Created fine-tuning job")
        return job

    def tell(self, name: str, message: str, level: str = "info", **data: float) -> None:
        """Add an event, of figures where there are some."""
        event = {"id": f"ftevent-{next(self._numbers)}", "at": time.time(), "level": level, "message": message}
        self.events[name].insert(0, {**event, "kind": "metrics" if data else "message", "data": data})

    def advance(self, name: str, steps: int) -> None:
        """Let a job do so many steps more; every tenth saves a checkpoint."""
        job = self.jobs[name]
        if job["status"] == "queued":
            job |= {"status": "running", "started_at": time.time(), "total": TOTAL, "attempts": 1}
        for _ in range(steps):
            job["step"] += 1
            step = job["step"]
            loss = 0.6 + 3.1 * 0.93**step + 0.12 * ((step * 7919) % 13 - 6) / 13
            self.steps[name].append({"step": step, "loss": loss, "tokens": 512, "grad_norm": 1.0})
            self.tell(name, f"Step {step}/{TOTAL}: training loss={loss:.4f}", step=step, train_loss=loss)
            if step % 10 == 0:
                held_out = 0.7 + 3 * 0.93**step
                self.tell(name, f"Step {step}/{TOTAL}: validation loss={held_out:.4f}", step=step, valid_loss=held_out)
                model = f"ft:{BASE}::{job['suffix']}:{name[-12:]}:ckpt-step-{step}"
                metrics = {"step": step, "train_loss": loss, "valid_loss": held_out}
                row = {"id": f"ftckpt-{name[-4:]}-{step}", "model": model, "step": step, "metrics": metrics}
                self.saved[name].insert(0, {**row, "at": time.time()})
                self.tell(name, f"Checkpoint created at step {step}")
        job |= {"seconds_per_step": 0.5, "seconds_left": (TOTAL - job["step"]) * 0.5}
        job |= {"bytes_up": 9_217 * 512 * job["step"] // 2, "bytes_down": 9_217 * 512 * job["step"] // 2}
        if job["step"] >= TOTAL:
            tuned = f"ft:{BASE}::{job['suffix']}:{name[-12:]}"
            job |= {"status": "succeeded", "finished_at": time.time(), "tuned_model": tuned, "seconds_left": None}
            self.tell(name, "The job has successfully completed")

    def fail(self, name: str, message: str) -> None:
        """Let a job fail."""
        error = {"code": 40, "message": message}
        self.jobs[name] |= {"status": "failed", "finished_at": time.time(), "seconds_left": None, "error": error}
        self.tell(name, message, "error")

    def routers(self) -> list[APIRouter]:
        """All that the page asks."""
        return [page_routes.router(), self._jobs_router(), self._openai_router()]

    def _job(self, name: str) -> dict[str, Any]:
        if name not in self.jobs:
            raise ApiError(404, f"there is no job {name!r}", code="not_found")
        return self.jobs[name]

    def _jobs_router(self) -> APIRouter:
        routes = APIRouter(prefix="/isthmus/v1/jobs")

        @routes.get("")
        def listed() -> dict[str, Any]:
            return _page(list(reversed(self.jobs.values())), "jobs")

        @routes.post("")
        def create(body: dict[str, Any]) -> dict[str, Any]:
            if (body["spec"].get("learning_rate") or 0) > 1:
                raise ApiError(400, "learning_rate = 5 is more than 1: give a smaller one")
            return self.add_job(body)

        @routes.get("/{name}")
        def one(name: str) -> dict[str, Any]:
            return self._job(name)

        @routes.delete("/{name}")
        def remove(name: str) -> dict[str, Any]:
            self._job(name)
            return {"deleted": self.jobs.pop(name) is not None}

        @routes.get("/{name}/steps")
        def steps(name: str, after: int = 0) -> dict[str, Any]:
            self._job(name)
            return _page([line for line in self.steps[name] if line["step"] > after], "steps")

        @routes.get("/{name}/events")
        def events(name: str, limit: int, after: str | None = None) -> dict[str, Any]:
            self._job(name)
            rows = self.events[name]
            first = 0 if after is None else 1 + [row["id"] for row in rows].index(after)
            return _page(rows[first : first + limit], "events") | {"has_more": first + limit < len(rows)}

        @routes.get("/{name}/checkpoints")
        def checkpoints(name: str) -> dict[str, Any]:
            self._job(name)
            return _page(self.saved[name], "checkpoints")

        @routes.post("/{name}/{action}")
        def act(name: str, action: str) -> dict[str, Any]:
            job = self._job(name)
            ended = {"status": "cancelled", "finished_at": time.time()}
            self.jobs[name]["seconds_left"] = None
            job |= {"pause": {"status": "paused"}, "resume": {"status": "queued"}, "retry": {"status": "queued"}}.get(
                action, ended
            )
            self.tell(name, f"The job is {job['status']}")
            return job

        return routes

    def _openai_router(self) -> APIRouter:
        routes = APIRouter(prefix="/v1")

        @routes.get("/models")
        def models() -> dict[str, Any]:
            names = [*self.bases, *(row["model"] for rows in self.saved.values() for row in rows)]
            return _page([{"id": name, "object": "model", "created": 1, "owned_by": "isthmus"} for name in names])

        @routes.get("/models/{name:path}")
        def model(name: str) -> dict[str, Any]:
            return {"id": name, "object": "model", "isthmus": {"form": self.form}}

        @routes.get("/files")
        def files() -> dict[str, Any]:
            return _page(self.files)

        @routes.get("/files/{name}")
        def file(name: str) -> dict[str, Any]:
            found = [row for row in self.files if row["id"] == name]
            if not found:
                raise ApiError(404, f"there is no file {name!r}", code="not_found")
            return found[0]

        @routes.post("/files")
        async def upload(request: Request) -> dict[str, Any]:
            async with request.form() as form:
                sent = cast(UploadFile, form["file"])
                content = await sent.read()
                row = {"id": f"file-{next(self._numbers)}", "filename": sent.filename, "bytes": len(content)}
                self.files.append({**row, "object": "file", "purpose": form["purpose"], "created_at": 1})
            return self.files[-1]

        @routes.post("/chat/completions")
        async def chat(body: dict[str, Any]) -> StreamingResponse:
            return self._stream(body, lambda text: {"delta": {"content": text}})

        @routes.post("/completions")
        async def completions(body: dict[str, Any]) -> StreamingResponse:
            return self._stream(body, lambda text: {"text": text}, "length")

        return routes

    def _stream(self, body: dict[str, Any], piece: Any, before: str | None = None) -> StreamingResponse:
        self.asked.append(body)
        if body["model"] == "broken":
            raise ApiError(503, "the cloud main is away", code="away")
        words = f"{'tuned' if body['model'].startswith('ft:') else 'base'}: {WORDS * 3}".split(" ")

        async def events() -> AsyncIterator[str]:
            for word in words:
                choice = {"index": 0, "finish_reason": before, **piece(word + " ")}
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
                await asyncio.sleep(self.slow)
            yield f"data: {json.dumps({'choices': [{'index': 0, 'finish_reason': self.finish, **piece('')}]})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @contextmanager
    def served(self) -> Iterator[FakeDaemon]:
        """Serve on a free port of loopback, in a thread."""
        app = application(self.context, self.routers())
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off", access_log=False))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.should_exit = server.force_exit = True
            thread.join()
            self.context.database.close()


def _page(rows: list[dict[str, Any]], name: str = "data") -> dict[str, Any]:
    return {name: rows, "has_more": False}
