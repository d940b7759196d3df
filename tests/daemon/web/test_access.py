"""Who gets in: each refusal, with what is let in beside it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from support.daemon.web.access_parts import (
    ERRORS,
    Everybody,
    client_of,
    context_in,
    empty,
    error_of,
    in_a_loop,
    sent_by,
)

from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.state.owners import give_token
from isthmus.daemon.web.access import Access
from isthmus.daemon.web.context import Context


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:7465", "10.0.0.1"])
def test_a_host_that_is_not_the_daemons_is_refused(client: TestClient, host: str) -> None:
    refused = client.get("/who", headers={"Host": host})
    assert (refused.status_code, error_of(refused)["code"]) == (403, "unknown_host")
    assert client.get("/healthz", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["", "a b", "user@127.0.0.1", "127.0.0.1:port", "127.0.0.1/x"])
def test_a_host_that_is_none_is_refused(client: TestClient, host: str) -> None:
    assert error_of(client.get("/who", headers={"Host": host}))["code"] == "bad_host"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:1", "LOCALHOST", "[::1]:7465", "box.lan", "box.lan.:80"])
def test_the_daemons_own_names_are_taken(client: TestClient, host: str) -> None:
    assert client.get("/who", headers={"Host": host}).json() == "first"


def test_a_daemon_for_all_addresses_takes_addresses_and_no_unknown_names(tmp_path: Path) -> None:
    client = client_of(context_in(tmp_path, listen="0.0.0.0:7465"))
    assert client.get("/who", headers={"Host": "10.0.0.1:7465"}).status_code == 200
    assert client.get("/who", headers={"Host": "evil.example"}).status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1:7465", "http://127.0.0.1:80"])
def test_a_page_of_another_origin_is_refused(client: TestClient, origin: str) -> None:
    for ask in (client.get, client.post, client.options):
        refused = ask("/who", headers={"Origin": origin})
        assert (refused.status_code, error_of(refused)["code"]) == (403, "other_origin")
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
    client = client_of(context)
    del client.headers["Authorization"]
    sent = {name: value.replace("{token}", token) for name, value in headers.items()}
    with caplog.at_level(logging.DEBUG):
        for path in ("/who", "/isthmus/v1/status", "/nothing", "/static"):
            refused = client.get(path, headers=sent)
            assert (refused.status_code, error_of(refused)["code"]) == (401, "invalid_api_key")
            assert refused.headers["www-authenticate"] == "Bearer"
    told = caplog.text + refused.text
    assert not any(value.split()[-1] in told for value in sent.values() if "tml" in value)


def test_a_token_is_taken_in_both_headers(context: Context) -> None:
    token = context.home.token.read_text().strip()
    client = client_of(context)
    del client.headers["Authorization"]
    for headers in ({"Authorization": f"Bearer {token}"}, {"authorization": f"bearer  {token} "}, {"X-API-Key": token}):
        assert client.get("/who", headers=headers).json() == "first"


def test_another_owner_has_a_token_of_their_own_and_a_new_one_ends_the_old(tmp_path: Path) -> None:
    context = context_in(tmp_path)
    old = give_token(context.database, "ci")
    client = client_of(context)
    assert client.get("/who", headers={"Authorization": f"Bearer {old}"}).json() == "ci"
    new = give_token(context.database, "ci")
    client = client_of(context)  # which reads the owners anew
    assert client.get("/who", headers={"Authorization": f"Bearer {old}"}).status_code == 401
    assert client.get("/who", headers={"Authorization": f"Bearer {new}"}).json() == "ci"


def test_the_status_names_no_adapter_of_anybody(tmp_path: Path) -> None:
    context = context_in(tmp_path)
    context.noted.answers = {"pid": 1, "hot": ["/home/models/ftmodel-of-another"]}
    told = client_of(context).get("/isthmus/v1/status")
    assert told.json()["answers"] == {"pid": 1, "hot": 1}
    assert "ftmodel" not in told.text
    context.database.close()


@pytest.mark.parametrize("path", ["/", "/healthz", "/static/page.js"])
def test_the_page_needs_no_token_to_be_read(context: Context, path: str) -> None:
    client = client_of(context)
    del client.headers["Authorization"]
    assert client.get(path).status_code == 200
    assert client.post(path).status_code == 401


def test_what_is_wrong_with_a_body_is_said_with_the_field(client: TestClient) -> None:
    wrong = client.post("/typed", json={"number": "x"})
    assert wrong.status_code == 400
    assert (error_of(wrong)["param"], error_of(wrong)["type"]) == ("number", "invalid_request_error")
    assert error_of(client.post("/typed", json={"number": 1, "parts": [1, "x"]}))["param"] == "parts.1"
    assert error_of(client.post("/typed", json={}))["param"] == "number"
    broken = client.post("/typed", content=b"{", headers={"Content-Type": "application/json"})
    assert (broken.status_code, error_of(broken)["code"]) == (400, "invalid_json")
    assert client.post("/typed", json={"number": 3}).json() == 3


def test_a_path_or_a_method_that_is_none_is_said_in_the_same_form(client: TestClient) -> None:
    assert client.get("/nothing").status_code == 404
    assert error_of(client.get("/nothing"))["type"] == "not_found_error"
    wrong = client.post("/who")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET")
    assert "GET" in error_of(wrong)["message"]


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
    assert (response.status_code, error_of(response)["message"]) == (status, str(ERRORS[name]))


@pytest.mark.parametrize("name", ["bug", "defect", "other"])
def test_a_defect_is_told_by_its_number_and_logged(
    client: TestClient, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    response = client.get(f"/fails/{name}")
    number = response.headers["x-request-id"]
    assert response.status_code == 500
    assert number in error_of(response)["message"]
    assert str(ERRORS[name]) not in response.text
    assert number in caplog.text
    assert "Traceback" in caplog.text


def test_every_answer_has_a_number_of_its_own(client: TestClient) -> None:
    answers = [client.get(path) for path in ("/who", "/stream", "/healthz", "/nothing", "/who")]
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)
    assert answers[1].text == "ab"


@in_a_loop
async def test_a_websocket_is_refused() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    door = Access(None, DaemonSettings(), Everybody())  # type: ignore[arg-type]
    await door({"type": "websocket", "path": "/", "headers": []}, empty, send)  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]


@in_a_loop
async def test_an_answer_that_is_cut_off_says_so() -> None:
    """As the daemon ends, what streams still is cancelled."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] != "/silent":
            kind = b"text/event-stream" if scope["path"] == "/events" else b"text/plain"
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await asyncio.Event().wait()

    door = Access(app, DaemonSettings(), Everybody())  # type: ignore[arg-type]
    sent = {}
    for path in ("/silent", "/events", "/text"):
        task = asyncio.create_task(sent_by(door, path, empty))
        await asyncio.sleep(0)
        task.cancel()
        sent[path] = await task
    assert (sent["/silent"][0]["status"], b"stopping" in sent["/silent"][1]["body"]) == (503, True)
    assert sent["/events"][2]["body"].startswith(b'data: {"error": {"message": "the daemon stops')
    assert not sent["/events"][2].get("more_body", False)
    assert len(sent["/text"]) == 2
