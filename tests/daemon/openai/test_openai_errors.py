"""Every error that the daemon can tell is one of the SDK's classes, in one form, with the request's id."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from openai import (
    APIConnectionError,
    APIError,
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    OpenAI,
    PermissionDeniedError,
    RateLimitError,
)
from support.daemon.openai_fakes import BASE


def chat(client: OpenAI, content: str = "hi", **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": BASE, "messages": [{"role": "user", "content": content}], **options}
    )


@pytest.mark.parametrize(
    ("kind", "status", "ask"),
    [
        (BadRequestError, 400, lambda client: chat(client, temperature=3)),
        (BadRequestError, 400, lambda client: chat(client, "too long")),
        (AuthenticationError, 401, lambda client: client.copy(api_key="tml-wrong").models.list()),
        (PermissionDeniedError, 403, lambda client: client.models.delete(BASE)),
        (PermissionDeniedError, 403, lambda client: client.models.list(extra_headers={"origin": "https://a.example"})),
        (NotFoundError, 404, lambda client: chat(client, model="other")),
        (NotFoundError, 404, lambda client: client.get("/nothing", cast_to=object)),
        (APIStatusError, 405, lambda client: client.put("/models", cast_to=object)),
        (APIStatusError, 415, lambda client: chat(client, extra_headers={"content-type": "text/plain"})),
        (RateLimitError, 429, lambda client: chat(client, "busy")),
        (InternalServerError, 500, lambda client: chat(client, "a defect")),
        (InternalServerError, 503, lambda client: chat(client, "away")),
        (InternalServerError, 503, lambda client: chat(client, "away", stream=True)),
    ],
)
def test_errors_have_classes_and_ids(
    client: OpenAI, kind: type[APIStatusError], status: int, ask: Callable[[OpenAI], Any]
) -> None:
    with pytest.raises(APIStatusError) as caught:
        ask(client)
    error = caught.value
    assert (type(error), error.status_code) == (kind, status)
    assert error.request_id is not None
    assert error.request_id.startswith("req_")
    told = error.response.json()["error"]
    assert told.keys() == {"message", "type", "param", "code"}
    assert all(isinstance(told[name], str) for name in ("message", "type"))
    assert "\n" not in told["message"]
    assert "secret" not in json.dumps(told)


def test_a_stream_that_breaks_says_so_in_the_stream(client: OpenAI) -> None:
    for content, message in (("breaks", "no more memory"), ("defect", "internal error: the daemon's log")):
        stream = chat(client, content, stream=True)
        assert [next(stream).choices[0].delta.content for _ in range(3)] == ["", "Once", " upon"]
        with pytest.raises(APIError, match=message) as caught:
            next(stream)
        assert not isinstance(caught.value, APIConnectionError)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", "not JSON"),
        (b"[]", "no object"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b'{"model": "a", "model": "b"}', "stands twice"),
        (b'{"model": NaN}', "NaN is no JSON"),
        (b'{"model": "\\ud800"}', "not JSON"),
        (b'{"model": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"model": "' + b"x" * 1000 + b'", "messages": []}', "messages"),
    ],
)
def test_a_broken_body_is_refused_in_one_short_line(client: OpenAI, body: bytes, error: str) -> None:
    headers = {"content-type": "application/json"}
    with pytest.raises(BadRequestError, match=error) as caught:
        client.post("/chat/completions", content=body, options={"headers": headers}, cast_to=object)
    assert len(caught.value.message) < 400
