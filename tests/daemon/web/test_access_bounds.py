"""How much may be asked at once, and how long a body may take and be: each refusal, with what is let in beside it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import anyio.to_thread
import httpx
import pytest
from fastapi import Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from support.daemon.web.access_parts import Everybody, empty, error_of, in_a_loop, routes, sent_by

from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.web import access
from isthmus.daemon.web.access import Access
from isthmus.daemon.web.application import application
from isthmus.daemon.web.context import Context


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_has_a_bound_and_a_file_another_one(
    client: TestClient, chunked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def send(path: str, size: int) -> Any:
        data = bytes(size)
        return client.post(path, content=iter([data[:9], data[9:]]) if chunked else data)

    assert send("/v1/things", 1 << 20).json() == 1 << 20
    refused = send("/v1/things", (1 << 20) + 1)
    assert (refused.status_code, error_of(refused)["code"]) == (413, "body_too_large")
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

    door = Access(app, DaemonSettings(), Everybody())  # type: ignore[arg-type]
    start, _ = asyncio.run(sent_by(door, "/v1/things", receive, "POST"))
    assert start["status"] == (400 if goes else 500)
    assert ("Traceback" in caplog.text) != goes


@in_a_loop
async def test_requests_under_way_are_bounded_and_the_status_is_answered(context: Context) -> None:
    settings = DaemonSettings(requests_at_once=8)
    done = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if not scope["path"].startswith(("/healthz", "/isthmus")):
            await done.wait()
        await JSONResponse("ok")(scope, receive, send)

    door = Access(app, settings, Everybody())  # type: ignore[arg-type]
    waiting = [asyncio.create_task(sent_by(door, "/who", empty)) for _ in range(8)]
    await asyncio.sleep(0)
    assert (await sent_by(door, "/who", empty))[0]["status"] == 503
    others = [asyncio.create_task(sent_by(door, "/who", empty, who="other")) for _ in range(2)]
    await asyncio.sleep(0)
    assert (await sent_by(door, "/who", empty, who="other"))[0]["status"] == 503  # who has had his share
    for path in ("/healthz", "/isthmus/v1/status"):
        assert (await sent_by(door, path, empty))[0]["status"] == 200
    done.set()
    assert {(await task)[0]["status"] for task in [*waiting, *others]} == {200}
    assert (await sent_by(door, "/who", empty))[0]["status"] == 200  # the places are free again


@in_a_loop
async def test_the_status_needs_no_thread_of_other_requests(context: Context) -> None:
    anyio.to_thread.current_default_thread_limiter().total_tokens = 1  # of this loop
    end = threading.Event()
    held = asyncio.create_task(anyio.to_thread.run_sync(end.wait))
    await asyncio.sleep(0)
    token = context.home.token.read_text().strip()
    transport = httpx.ASGITransport(application(context, [routes()]))
    headers = {"Authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
        other = asyncio.create_task(client.get("/who"))
        for path in ("/healthz", "/isthmus/v1/status"):
            assert (await client.get(path)).status_code == 200
        assert not other.done()
        end.set()
        assert (await other).json() == "first"
    await held


@in_a_loop
async def test_requests_without_a_token_take_no_place_of_those_with_one() -> None:
    done = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/static/held":
            await done.wait()
        await JSONResponse("ok")(scope, receive, send)

    class Nobody:
        def find(self, _token: str, *, hub: bool) -> None:
            return None

    door = Access(app, DaemonSettings(requests_at_once=8), Nobody())  # type: ignore[arg-type]
    held = asyncio.Event()

    async def stalled(message: dict[str, Any]) -> None:
        await held.wait()

    headers = [(b"host", b"localhost"), (b"x-api-key", b"no")]
    scope = {"type": "http", "method": "GET", "path": "/who", "headers": headers, "scheme": "http"}
    refused = [asyncio.create_task(door(dict(scope), empty, stalled)) for _ in range(8)]  # type: ignore[arg-type]
    pages = [asyncio.create_task(sent_by(door, "/static/held", empty)) for _ in range(8)]
    await asyncio.sleep(0)
    door._owners = Everybody()  # type: ignore[assignment]
    assert (await sent_by(door, "/who", empty))[0]["status"] == 200
    assert (await sent_by(door, "/static/more", empty))[0]["status"] == 503  # those without a token have a bound, too
    held.set()
    done.set()
    await asyncio.gather(*refused, *pages)
    assert [places.taken.total() for places in door._under_way.values()] == [0, 0]


@in_a_loop
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

    door = Access(app, DaemonSettings(body_mib=1), Everybody())  # type: ignore[arg-type]
    assert (await sent_by(door, "/x", empty, "POST"))[0]["status"] == 200
    monkeypatch.setattr(access, "PIECE_SECONDS", 0.05)
    sent = await sent_by(door, "/x", never, "POST")
    assert [message.get("status") for message in sent] == [408, None]  # and nothing of what the application sent
    monkeypatch.setattr(access, "PIECE_SECONDS", 30.0)
    monkeypatch.setattr(access, "BODY_SECONDS", 0.1)
    monkeypatch.setattr(access, "LEAST_RATE", 1 << 40)
    assert (await sent_by(door, "/x", drops, "POST"))[0]["status"] == 408


@in_a_loop
async def test_all_bodies_together_have_a_bound_and_files_are_not_counted() -> None:
    done = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        if message["type"] == "http.request" and scope["path"] == "/held":
            await done.wait()
        await JSONResponse("ok")(scope, receive, send)

    async def large() -> dict[str, Any]:
        return {"type": "http.request", "body": bytes(1 << 20), "more_body": False}

    door = Access(app, DaemonSettings(body_mib=1), Everybody())  # type: ignore[arg-type]
    held = [asyncio.create_task(sent_by(door, "/held", large, "POST")) for _ in range(access.BODIES)]
    while door._memory.taken.total() < door._memory.most:
        await asyncio.sleep(0)
    refused = await sent_by(door, "/x", large, "POST")
    assert (refused[0]["status"], b"overloaded" in refused[1]["body"]) == (503, True)
    assert (await sent_by(door, "/x", large, "POST", who="other"))[0]["status"] == 200
    for path, receive in (("/x", empty), ("/v1/files", large)):
        assert (await sent_by(door, path, receive, "POST"))[0]["status"] == 200
    done.set()
    assert {(await task)[0]["status"] for task in held} == {200}
    assert door._memory.taken.total() == 0
    assert (await sent_by(door, "/x", large, "POST"))[0]["status"] == 200
