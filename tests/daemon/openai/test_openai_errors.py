"""Every error that the daemon can tell is one of the SDK's classes, in one form, with the request's id."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import (
    APIConnectionError,
    APIError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    InternalServerError,
    LengthFinishReasonError,
    NotFoundError,
    OpenAI,
    OpenAIError,
    PermissionDeniedError,
    RateLimitError,
)
from support.daemon.openai_fakes import BASE
from support.daemon.tinker_process import free_port

from isthmus import daemon
from isthmus.common import errors
from isthmus.common.errors import IsthmusError
from isthmus.daemon.web import refusals
from isthmus.daemon.workers.asking import WorkerError


def chat(client: OpenAI, content: str = "hi", **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": BASE, "messages": [{"role": "user", "content": content}], **options}
    )


# Every class of the SDK that can occur: with the status of its answer, or without one.
ANSWERED: list[tuple[type[APIStatusError], int, Callable[[OpenAI], Any]]] = [
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
]
UNANSWERED: list[tuple[type[OpenAIError], Callable[[OpenAI], Any]]] = [
    (APIError, lambda client: list(chat(client, "breaks", stream=True))),
    (APIConnectionError, lambda client: chat(client.copy(base_url=f"http://127.0.0.1:{free_port()}/v1"))),
    (APITimeoutError, lambda client: chat(client, "stays", timeout=0.5)),
    (LengthFinishReasonError, lambda client: parse(client, max_tokens=2)),
]
NEVER = {
    "ConflictError": "409: the SDK would repeat what a job's state does not allow; that is a 400",
    "UnprocessableEntityError": "422: a body that makes no sense is a 400, as OpenAI's is",
    "APIResponseValidationError": "an answer that is not in the document",
    "ContentFilterFinishReasonError": "no answer is filtered",
    "OpenAIError": "a client without a key, which asks nobody",
    "OAuthError": "a token of another service",
    "InvalidWebhookSignatureError": "there are no webhooks",
    "WebSocketConnectionClosedError": "there are no web sockets",
    "WebSocketQueueFullError": "there are no web sockets",
}


def parse(client: OpenAI, **options: Any) -> Any:
    return client.chat.completions.parse(model=BASE, messages=[{"role": "user", "content": "hi"}], **options)


@pytest.mark.parametrize(("kind", "status", "ask"), ANSWERED)
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


@pytest.mark.parametrize(("kind", "ask"), UNANSWERED)
def test_errors_without_a_status_have_classes(
    client: OpenAI, kind: type[OpenAIError], ask: Callable[[OpenAI], Any]
) -> None:
    with pytest.raises(OpenAIError) as caught:
        ask(client)
    assert type(caught.value) is kind


def test_a_path_that_is_not_there_names_those_that_are(client: OpenAI) -> None:
    there = "there are /v1/chat/completions, /v1/completions, /v1/files, /v1/fine_tuning/jobs and /v1/models"
    for path, ask in (
        ("responses", lambda: client.responses.create(model=BASE, input="hi")),
        ("embeddings", lambda: client.embeddings.create(model=BASE, input="hi")),
    ):
        with pytest.raises(NotFoundError, match=f"'/v1/{path}' is not offered here: {there}"):
            ask()
    for path in ("/responses", "/batches/batch_1/cancel"):
        for method in (client.put, client.patch, client.delete):
            with pytest.raises(NotFoundError, match=f"'/v1{path}' is not offered here"):
                method(path, cast_to=object)
    for ask in (lambda: client.models.retrieve("other"), lambda: client.get("/responsesfoo", cast_to=object)):
        with pytest.raises(NotFoundError) as caught:  # a path that is there names none, nor does any other
            ask()
        assert "/v1/completions" not in caught.value.message


def test_every_class_of_the_sdk_occurs_or_is_named_as_one_that_cannot() -> None:
    public = {name: each for name, each in list(vars(openai).items()) if not name.startswith("_")}
    classes = {name for name, each in public.items() if isinstance(each, type) and issubclass(each, OpenAIError)}
    occur = {row[0].__name__ for row in (*ANSWERED, *UNANSWERED)}
    assert occur.isdisjoint(NEVER)
    assert classes - occur == classes & NEVER.keys()


def test_every_kind_of_error_has_a_status_or_is_named_as_one_that_no_request_meets() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, IsthmusError)]
    without = {kind.exit_code for kind in kinds if refusals.status_of(kind("")) == 500}
    assert without == {
        1,  # a defect
        52, 61, 63, 64,  # the daemon's own home: it does not start, or is in a state that its owner must mend
        73,  # `isthmus experiment`
    }  # fmt: skip


def statuses_in(source: str) -> set[int]:
    """The statuses that a module's errors name."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args]
    firsts = [call.args[0] for call in calls if isinstance(call.func, ast.Name) and call.func.id == "ApiError"]
    return {first.value for first in firsts if isinstance(first, ast.Constant) and isinstance(first.value, int)}


def test_no_error_has_status_409_or_422(client: OpenAI, training_file: str) -> None:
    folder = Path(daemon.__file__).parent
    named = set().union(*(statuses_in(path.read_text(encoding="utf-8")) for path in folder.rglob("*.py")))
    named |= {refusals.status_of(WorkerError("", code)) for code in range(256)}
    assert {400, 401, 403, 404, 429, 500, 502, 503, 507} <= named
    assert named.isdisjoint({409, 422})
    assert statuses_in("raise ApiError(409, 'no')") == {409}  # the check sees one
    job = client.fine_tuning.jobs.create(model=BASE, training_file=training_file, seed=409)
    client.fine_tuning.jobs.cancel(job.id)
    with pytest.raises(BadRequestError) as caught:
        client.fine_tuning.jobs.cancel(job.id)
    assert caught.value.code == "wrong_state"


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
        (b'{"a":' * 10_000, "nested deeper than 64"),
        (b'{"a":' * 100_000, "more than 65536 texts"),
        (b'{"model": "' + b"x" * 1000 + b'", "messages": []}', "messages"),
    ],
)
def test_a_broken_body_is_refused_in_one_short_line(client: OpenAI, body: bytes, error: str) -> None:
    headers = {"content-type": "application/json"}
    with pytest.raises(BadRequestError, match=error) as caught:
        client.post("/chat/completions", content=body, options={"headers": headers}, cast_to=object)
    assert len(caught.value.message) < 400
