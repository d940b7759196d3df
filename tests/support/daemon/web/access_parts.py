"""The daemon's door with paths of the tests behind it, and how they ask it."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient
from pydantic import BaseModel
from support.daemon.daemon_parts import make_parts

from isthmus.common.errors import DiskError, IsthmusError, UnknownModelError, UnreachableError, WorkerDiedError
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.home import Home
from isthmus.daemon.jobs.job_service import UnknownJobError, WrongStateError
from isthmus.daemon.serving.answers import BusyError
from isthmus.daemon.web.api_error import ApiError
from isthmus.daemon.web.application import application
from isthmus.daemon.web.context import Asker, Context
from isthmus.daemon.workers.asking import WorkerError

ERRORS: dict[str, Exception] = {
    "api": ApiError(400, "no", param="x", code="bad"),
    "disk": DiskError("the home is full"),
    "model": UnknownModelError("no cloud serves it"),
    "away": UnreachableError("the cloud is away"),
    "died": WorkerDiedError("it has ended"),
    "long": WorkerError("the prompt is too long", 10),
    "defect": WorkerError("internal error: KeyError", 1),
    "other": IsthmusError("a kind without a status"),
    "busy": BusyError("many wait"),
    "job": UnknownJobError("there is no such job"),
    "state": WrongStateError("it is paused"),
    "bug": KeyError("a secret of the code"),
}


class Body(BaseModel):
    number: int
    parts: list[int] = []


def routes() -> APIRouter:
    made = APIRouter()

    @made.get("/who")
    def who(owner: Asker) -> str:
        return owner.name

    @made.post("/v1/files")
    @made.post("/v1/things")
    async def count(request: Request) -> int:
        return sum([len(piece) async for piece in request.stream()])

    @made.post("/typed")
    def typed(body: Body) -> int:
        return body.number

    @made.get("/fails/{name}")
    def fails(name: str) -> None:
        raise ERRORS[name]

    @made.get("/stream")
    async def stream() -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            yield "a"
            yield "b"

        return StreamingResponse(pieces())

    @made.get("/static/page.js")
    @made.get("/")
    def page() -> JSONResponse:
        return JSONResponse("page")

    return made


def context_in(folder: Path, **settings: Any) -> Context:
    return make_parts(DaemonSettings.model_validate(settings), Home.make(folder / "home"))


def client_of(context: Context) -> TestClient:
    token = context.home.token.read_text().strip()
    client = TestClient(application(context, [routes()]), base_url="http://127.0.0.1:7465")
    client.headers["Authorization"] = f"Bearer {token}"
    return client


def error_of(response: Any) -> dict[str, Any]:
    """The error of an answer, whose form is checked."""
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"].startswith("req_")
    return error


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine, as one that pytest runs."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


async def sent_by(app: Any, path: str, receive: Any, method: str = "GET", *, who: str = "one") -> list[dict[str, Any]]:
    """What an application (ASGI) sends."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"x-api-key", who.encode())]
    scope = {"type": "http", "method": method, "path": path, "headers": headers, "scheme": "http", "query_string": b""}
    await app(scope, receive, send)
    return sent


class Everybody:
    """Each token is that of an owner of this id."""

    def find(self, token: str, *, hub: bool) -> object:
        return SimpleNamespace(id=token)


async def empty() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}
