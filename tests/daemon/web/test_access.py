"""Who gets in: each refusal, with what is let in beside it."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import anyio.to_thread
import httpx
import pytest
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
from isthmus.daemon.state.owners import give_token
from isthmus.daemon.web import access
from isthmus.daemon.web.access import Access
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


def _router() -> APIRouter:
    routes = APIRouter()

    @routes.get("/who")
    def who(owner: Asker) -> str:
        return owner.name

    @routes.post("/v1/files")
    @routes.post("/v1/things")
    async def count(request: Request) -> int:
        return sum([len(piece) async for piece in request.stream()])

    @routes.post("/typed")
    def typed(body: Body) -> int:
        return body.number

    @routes.get("/fails/{name}")
    def fails(name: str) -> None:
        raise ERRORS[name]

    @routes.get("/stream")
    async def stream() -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            yield "a"
            yield "b"

        return StreamingResponse(pieces())

    @routes.get("/static/page.js")
    @routes.get("/")
    def page() -> JSONResponse:
        return JSONResponse("page")

    return routes


def _context(folder: Path, **settings: Any) -> Context:
    return make_parts(DaemonSettings.model_validate(settings), Home.make(folder / "home"))


def _client(context: Context) -> TestClient:
    token = context.home.token.read_text().strip()
    client = TestClient(application(context, [_router()]), base_url="http://127.0.0.1:7465")
    client.headers["Authorization"] = f"Bearer {token}"
    return client


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Context]:
    made = _context(tmp_path_factory.mktemp("access"), body_mib=1, upload_mib=2, hosts=["box.lan"])
    yield made
    made.database.close()


@pytest.fixture
def client(context: Context) -> TestClient:
    return _client(context)


def _error(response: Any) -> dict[str, Any]:
    """The error of an answer, whose form is checked."""
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"].startswith("req_")
    return error


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:7465", "10.0.0.1"])
def test_a_host_that_is_not_the_daemons_is_refused(client: TestClient, host: str) -> None:
    refused = client.get("/who", headers={"Host": host})
    assert (refused.status_code, _error(refused)["code"]) == (403, "unknown_host")
    assert client.get("/healthz", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["", "a b", "user@127.0.0.1", "127.0.0.1:port", "127.0.0.1/x"])
def test_a_host_that_is_none_is_refused(client: TestClient, host: str) -> None:
    assert _error(client.get("/who", headers={"Host": host}))["code"] == "bad_host"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:1", "LOCALHOST", "[::1]:7465", "box.lan", "box.lan.:80"])
def test_the_daemons_own_names_are_taken(client: TestClient, host: str) -> None:
    assert client.get("/who", headers={"Host": host}).json() == "first"


def test_a_daemon_for_all_addresses_takes_addresses_and_no_unknown_names(tmp_path: Path) -> None:
    client = _client(_context(tmp_path, listen="0.0.0.0:7465"))
    assert client.get("/who", headers={"Host": "10.0.0.1:7465"}).status_code == 200
    assert client.get("/who", headers={"Host": "evil.example"}).status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1:7465", "http://127.0.0.1:80"])
def test_a_page_of_another_origin_is_refused(client: TestClient, origin: str) -> None:
    for ask in (client.get, client.post, client.options):
        refused = ask("/who", headers={"Origin": origin})
        assert (refused.status_code, _error(refused)["code"]) == (403, "other_origin")
        assert not any(name.startswith("access-control") for name in refused.headers)


def test_the_daemons_own_page_is_let_in(client: TestClient) -> None:
    assert client.get("/who", headers={"Origin": "http://127.0.0.1:7465"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer tml-" + "a" * 43},
        {"Authorization": "Basic {token}"},
        {"Authorization": "Bearer {token}x"},
        {"X-API-Key": "tml-no"},
    ],
)
def test_without_a_token_of_its_own_a_request_is_refused(
    context: Context, headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    token = context.home.token.read_text().strip()
    client = _client(context)
    del client.headers["Authorization"]
    sent = {name: value.replace("{token}", token) for name, value in headers.items()}
    with caplog.at_level(logging.DEBUG):
        for path in ("/who", "/isthmus/v1/status", "/nothing", "/static"):
            refused = client.get(path, headers=sent)
            assert (refused.status_code, _error(refused)["code"]) == (401, "invalid_api_key")
            assert refused.headers["www-authenticate"] == "Bearer"
    told = caplog.text + refused.text
    assert not any(value.split()[-1] in told for value in sent.values() if "tml" in value)


def test_a_token_is_taken_in_both_headers(context: Context) -> None:
    token = context.home.token.read_text().strip()
    client = _client(context)
    del client.headers["Authorization"]
    for headers in ({"Authorization": f"Bearer {token}"}, {"authorization": f"bearer  {token} "}, {"X-API-Key": token}):
        assert client.get("/who", headers=headers).json() == "first"


def test_another_owner_has_a_token_of_their_own_and_a_new_one_ends_the_old(tmp_path: Path) -> None:
    context = _context(tmp_path)
    old = give_token(context.database, "ci")
    client = _client(context)
    assert client.get("/who", headers={"Authorization": f"Bearer {old}"}).json() == "ci"
    new = give_token(context.database, "ci")
    client = _client(context)  # which reads the owners anew
    assert client.get("/who", headers={"Authorization": f"Bearer {old}"}).status_code == 401
    assert client.get("/who", headers={"Authorization": f"Bearer {new}"}).json() == "ci"


def test_the_status_names_no_adapter_of_anybody(tmp_path: Path) -> None:
    context = _context(tmp_path)
    context.noted.answers = {"pid": 1, "hot": ["/home/models/ftmodel-of-another"]}
    told = _client(context).get("/isthmus/v1/status")
    assert told.json()["answers"] == {"pid": 1, "hot": 1}
    assert "ftmodel" not in told.text
    context.database.close()


@pytest.mark.parametrize("path", ["/", "/healthz", "/static/page.js"])
def test_the_page_needs_no_token_to_be_read(context: Context, path: str) -> None:
    client = _client(context)
    del client.headers["Authorization"]
    assert client.get(path).status_code == 200
    assert client.post(path).status_code == 401


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_has_a_bound_and_a_file_another_one(
    client: TestClient, chunked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def send(path: str, size: int) -> Any:
        data = bytes(size)
        return client.post(path, content=iter([data[:9], data[9:]]) if chunked else data)

    assert send("/v1/things", 1 << 20).json() == 1 << 20
    refused = send("/v1/things", (1 << 20) + 1)
    assert (refused.status_code, _error(refused)["code"]) == (413, "body_too_large")
    most = (2 << 20) + access.FRAMING
    assert send("/v1/files", most).json() == most
    assert send("/v1/files", most + 1).status_code == 413
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("goes", [True, False])
def test_a_client_that_goes_before_its_body_has_ended_is_no_defect(
    caplog: pytest.LogCaptureFixture, goes: bool
) -> None:
    async def receive() -> dict[str, Any]:
        if goes:
            return {"type": "http.disconnect"}
        raise KeyError("a defect")

    async def app(scope: Any, receive: Any, _send: Any) -> None:
        await Request(scope, receive).body()

    door = Access(app, DaemonSettings(), _Everybody())  # type: ignore[arg-type]
    start, _ = asyncio.run(_ask(door, "/v1/things", receive, "POST"))
    assert start["status"] == (400 if goes else 500)
    assert ("Traceback" in caplog.text) != goes


def test_what_is_wrong_with_a_body_is_said_with_the_field(client: TestClient) -> None:
    wrong = client.post("/typed", json={"number": "x"})
    assert wrong.status_code == 400
    assert (_error(wrong)["param"], _error(wrong)["type"]) == ("number", "invalid_request_error")
    assert _error(client.post("/typed", json={"number": 1, "parts": [1, "x"]}))["param"] == "parts.1"
    assert _error(client.post("/typed", json={}))["param"] == "number"
    broken = client.post("/typed", content=b"{", headers={"Content-Type": "application/json"})
    assert (broken.status_code, _error(broken)["code"]) == (400, "invalid_json")
    assert client.post("/typed", json={"number": 3}).json() == 3


def test_a_path_or_a_method_that_is_none_is_said_in_the_same_form(client: TestClient) -> None:
    assert client.get("/nothing").status_code == 404
    assert _error(client.get("/nothing"))["type"] == "not_found_error"
    wrong = client.post("/who")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET")
    assert "GET" in _error(wrong)["message"]


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("api", 400),
        ("disk", 507),
        ("model", 404),
        ("away", 503),
        ("died", 503),
        ("long", 400),
        ("busy", 429),
        ("job", 404),
        ("state", 400),
    ],
)
def test_an_error_has_its_status_and_its_message(client: TestClient, name: str, status: int) -> None:
    response = client.get(f"/fails/{name}")
    assert (response.status_code, _error(response)["message"]) == (status, str(ERRORS[name]))


@pytest.mark.parametrize("name", ["bug", "defect", "other"])
def test_a_defect_is_told_by_its_number_and_logged(
    client: TestClient, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    response = client.get(f"/fails/{name}")
    number = response.headers["x-request-id"]
    assert response.status_code == 500
    assert number in _error(response)["message"]
    assert str(ERRORS[name]) not in response.text
    assert number in caplog.text
    assert "Traceback" in caplog.text


def test_every_answer_has_a_number_of_its_own(client: TestClient) -> None:
    answers = [client.get(path) for path in ("/who", "/stream", "/healthz", "/nothing", "/who")]
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)
    assert answers[1].text == "ab"


def _in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine, as one that pytest runs."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


async def _ask(app: Any, path: str, receive: Any, method: str = "GET") -> list[dict[str, Any]]:
    """What an application (ASGI) sends."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"x-api-key", b"t")]
    scope = {"type": "http", "method": method, "path": path, "headers": headers, "scheme": "http", "query_string": b""}
    await app(scope, receive, send)
    return sent


class _Everybody:
    def find(self, _token: str) -> object:
        return object()


async def _empty() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


@_in_a_loop
async def test_requests_under_way_are_bounded_and_the_status_is_answered(context: Context) -> None:
    settings = DaemonSettings(requests_at_once=8)
    done = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if not scope["path"].startswith(("/healthz", "/isthmus")):
            await done.wait()
        await JSONResponse("ok")(scope, receive, send)

    door = Access(app, settings, _Everybody())  # type: ignore[arg-type]
    waiting = [asyncio.create_task(_ask(door, "/who", _empty)) for _ in range(8)]
    await asyncio.sleep(0)
    assert (await _ask(door, "/who", _empty))[0]["status"] == 503
    for path in ("/healthz", "/isthmus/v1/status"):
        assert (await _ask(door, path, _empty))[0]["status"] == 200
    done.set()
    assert {(await task)[0]["status"] for task in waiting} == {200}
    assert (await _ask(door, "/who", _empty))[0]["status"] == 200  # the places are free again


@_in_a_loop
async def test_the_status_needs_no_thread_of_other_requests(context: Context) -> None:
    anyio.to_thread.current_default_thread_limiter().total_tokens = 1  # of this loop
    end = threading.Event()
    held = asyncio.create_task(anyio.to_thread.run_sync(end.wait))
    await asyncio.sleep(0)
    token = context.home.token.read_text().strip()
    transport = httpx.ASGITransport(application(context, [_router()]))
    headers = {"Authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
        other = asyncio.create_task(client.get("/who"))
        for path in ("/healthz", "/isthmus/v1/status"):
            assert (await client.get(path)).status_code == 200
        assert not other.done()
        end.set()
        assert (await other).json() == "first"
    await held


@_in_a_loop
async def test_requests_without_a_token_take_no_place_of_those_with_one() -> None:
    done = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/static/held":
            await done.wait()
        await JSONResponse("ok")(scope, receive, send)

    class Nobody:
        def find(self, _token: str) -> None:
            return None

    door = Access(app, DaemonSettings(requests_at_once=8), Nobody())  # type: ignore[arg-type]
    held = asyncio.Event()

    async def stalled(message: dict[str, Any]) -> None:
        await held.wait()

    headers = [(b"host", b"localhost"), (b"x-api-key", b"no")]
    scope = {"type": "http", "method": "GET", "path": "/who", "headers": headers, "scheme": "http"}
    refused = [asyncio.create_task(door(dict(scope), _empty, stalled)) for _ in range(8)]  # type: ignore[arg-type]
    pages = [asyncio.create_task(_ask(door, "/static/held", _empty)) for _ in range(8)]
    await asyncio.sleep(0)
    door._owners = _Everybody()  # type: ignore[assignment]
    assert (await _ask(door, "/who", _empty))[0]["status"] == 200
    assert (await _ask(door, "/static/more", _empty))[0]["status"] == 503  # those without a token have a bound, too
    held.set()
    done.set()
    await asyncio.gather(*refused, *pages)
    assert door._under_way == {False: 0, True: 0}


@_in_a_loop
async def test_a_body_that_comes_too_slowly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "http.request" and message["more_body"]:
            pass
        await JSONResponse(message["type"])(scope, receive, send)

    async def never() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def drops() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    door = Access(app, DaemonSettings(body_mib=1), _Everybody())  # type: ignore[arg-type]
    assert (await _ask(door, "/x", _empty, "POST"))[0]["status"] == 200
    monkeypatch.setattr(access, "PIECE_SECONDS", 0.05)
    sent = await _ask(door, "/x", never, "POST")
    assert [message.get("status") for message in sent] == [408, None]  # and nothing of what the application sent
    monkeypatch.setattr(access, "PIECE_SECONDS", 30.0)
    monkeypatch.setattr(access, "BODY_SECONDS", 0.1)
    monkeypatch.setattr(access, "LEAST_RATE", 1 << 40)
    assert (await _ask(door, "/x", drops, "POST"))[0]["status"] == 408


@_in_a_loop
async def test_a_websocket_is_refused() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    door = Access(None, DaemonSettings(), _Everybody())  # type: ignore[arg-type]
    await door({"type": "websocket", "path": "/", "headers": []}, _empty, send)  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]


@_in_a_loop
async def test_an_answer_that_is_cut_off_says_so() -> None:
    """As the daemon ends, what streams still is cancelled."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] != "/silent":
            kind = b"text/event-stream" if scope["path"] == "/events" else b"text/plain"
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await asyncio.Event().wait()

    door = Access(app, DaemonSettings(), _Everybody())  # type: ignore[arg-type]
    sent = {}
    for path in ("/silent", "/events", "/text"):
        task = asyncio.create_task(_ask(door, path, _empty))
        await asyncio.sleep(0)
        task.cancel()
        sent[path] = await task
    assert (sent["/silent"][0]["status"], b"stopping" in sent["/silent"][1]["body"]) == (503, True)
    assert sent["/events"][2]["body"].startswith(b'data: {"error": {"message": "the daemon stops')
    assert not sent["/events"][2].get("more_body", False)
    assert len(sent["/text"]) == 2


@_in_a_loop
async def test_all_bodies_together_have_a_bound_and_files_are_not_counted() -> None:
    done = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        if message["type"] == "http.request" and scope["path"] == "/held":
            await done.wait()
        await JSONResponse("ok")(scope, receive, send)

    async def large() -> dict[str, Any]:
        return {"type": "http.request", "body": bytes(1 << 20), "more_body": False}

    door = Access(app, DaemonSettings(body_mib=1), _Everybody())  # type: ignore[arg-type]
    held = [asyncio.create_task(_ask(door, "/held", large, "POST")) for _ in range(access.BODIES)]
    while door._memory.taken < door._memory.most:
        await asyncio.sleep(0)
    refused = await _ask(door, "/x", large, "POST")
    assert (refused[0]["status"], b"overloaded" in refused[1]["body"]) == (503, True)
    for path, receive in (("/x", _empty), ("/v1/files", large)):
        assert (await _ask(door, path, receive, "POST"))[0]["status"] == 200
    done.set()
    assert {(await task)[0]["status"] for task in held} == {200}
    assert door._memory.taken == 0
    assert (await _ask(door, "/x", large, "POST"))[0]["status"] == 200
