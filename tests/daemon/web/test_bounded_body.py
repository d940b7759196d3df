"""What a body that is wrong may cost, beside what the same models without bounds take."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel, ConfigDict, FailFast, ValidationError

from isthmus.common.errors import DataError
from isthmus.daemon.openai.completions.chat_bodies import ChatBody
from isthmus.daemon.openai.completions.completion_bodies import CompletionBody
from isthmus.daemon.openai.job_bodies import JobBody
from isthmus.daemon.openai.request_fields import checked
from isthmus.daemon.openai.training_files import read_training_file
from isthmus.daemon.page.jobs_api import JobRequest
from isthmus.daemon.tinker.endpoints.tinker_bodies import parsed
from isthmus.daemon.tinker.tinker_requests import End, NewSession, Sample, SamplingParams
from isthmus.daemon.web import refusals
from isthmus.daemon.web.api_error import ApiError
from isthmus.daemon.web.bounded_body import BoundedBody, few
from isthmus.daemon.web.json_object import parse_object

SIZE = 64 << 10
MOST = 40
"""Bytes of memory for each byte of a body: JSON alone, `[{},{},…]` as Python's objects, takes 25."""

NAMES = {f"{number:x}": 1 for number in range(SIZE // 12)}
ONES = [1] * (SIZE // 3)
OBJECTS: list[Any] = [{}] * (SIZE // 4)
MESSAGES = [{"role": "user", "content": ""}] * 5000


class PlainPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    text: str = ""


class Plain(PlainPart):
    """As a body would be without bounds."""

    parts: list[PlainPart] = []
    labels: dict[str, str] = {}


class Part(BoundedBody):
    text: str = ""


class Bounded(Part):
    parts: Annotated[list[Part], FailFast()]
    labels: Annotated[dict[str, str], few(16)]


def _cost(work: Callable[[bytes], Any], tree: Any) -> float:
    """Bytes of memory that refusing a body takes at most, for each of its own."""
    body = json.dumps(tree, separators=(",", ":")).encode()
    tracemalloc.start()
    try:
        with pytest.raises((ApiError, ValidationError)) as refused:
            work(body)
        if isinstance(refused.value, ValidationError):
            refused.value.errors()
        return tracemalloc.get_traced_memory()[1] / len(body)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("tree", [NAMES, {"parts": ONES}, {"parts": [NAMES]}, {"labels": NAMES}])
def test_a_body_that_is_all_wrong_is_refused_at_its_first_mistake(tree: Any) -> None:
    assert _cost(Bounded.model_validate_json, tree) < MOST
    assert _cost(Plain.model_validate_json, tree) > 2 * MOST


@pytest.mark.parametrize(
    ("kind", "tree"),
    [
        *((kind, NAMES) for kind in (ChatBody, CompletionBody, JobBody)),
        *((ChatBody, {"model": "m", "messages": items}) for items in (ONES, OBJECTS, MESSAGES, [NAMES])),
        (ChatBody, {"model": "m", "messages": [{"role": "user", "content": OBJECTS}]}),
        (ChatBody, {"model": "m", "messages": MESSAGES[:1], "stop": ONES, "logit_bias": NAMES, "tools": OBJECTS}),
        *((CompletionBody, {"model": "m", "prompt": items}) for items in (OBJECTS, [ONES, "a"], ["a"] * len(OBJECTS))),
        (JobBody, {"model": "m", "training_file": "f", "metadata": NAMES}),
        (JobBody, {"model": "m", "training_file": "f", "method": NAMES}),
    ],
)
def test_openais_bodies_are_bounded(kind: type[Any], tree: Any) -> None:
    assert _cost(lambda body: checked(kind, parse_object(body)), tree) < MOST


@pytest.mark.parametrize(
    ("kind", "tree"),
    [
        *((kind, NAMES) for kind in (NewSession, Sample, SamplingParams, End)),
        (NewSession, {"tags": ONES}),
        (Sample, {"prompt": {"chunks": ONES}}),
        (SamplingParams, {"stop": OBJECTS}),
        (End, {"reason": NAMES}),
    ],
)
def test_the_other_apis_bodies_are_bounded(kind: type[Any], tree: Any) -> None:
    assert _cost(kind.model_validate_json, tree) < MOST


@pytest.mark.parametrize(
    "tree",
    [
        NAMES,
        {"kind": "train", "model": "m", "spec": NAMES},
        {"kind": "train", "model": "m", "spec": {}, "labels": NAMES},
    ],
)
def test_a_jobs_body_is_bounded(tree: Any) -> None:
    assert _cost(lambda body: JobRequest.model_validate(parse_object(body)), tree) < MOST


def _refusal(reads: str, body: bytes, folder: Path) -> str:
    """What reading a body, or a line of data, is refused with; nothing where it is read."""
    path = folder / "a.jsonl"
    path.write_bytes(body)
    ways: dict[str, Callable[[], object]] = {
        "openai": lambda: parse_object(body),
        "tinker": lambda: parsed(body, NewSession),
        "line": lambda: read_training_file(path, path.name),
    }
    try:
        ways[reads]()
    except (ApiError, DataError) as error:
        return f"{getattr(error, 'status', 400)}: {error}"
    return ""


@pytest.mark.parametrize("reads", ["openai", "tinker", "line"])
@pytest.mark.parametrize(
    ("part", "count", "says"),
    [
        ("[],", 70_000, "holds more than 65536 texts, lists and objects"),
        ("1,", 330_000, "holds more than 327680 values"),
        ("[" * 100 + "1" + "]" * 100 + ",", 1, "has lists and objects nested deeper than 64"),
    ],
)
def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(
    tmp_path: Path, reads: str, part: str, count: int, says: str
) -> None:
    body = f'{{"messages":[{part * count}0]}}'.encode()
    tracemalloc.start()
    try:
        refusal = _refusal(reads, body, tmp_path)
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refusal.startswith("400: ")
    assert says in refusal
    assert taken < 8 * len(body) + (64 << 10)
    assert says not in _refusal(reads, b'{"messages":[[],1,[[]]]}', tmp_path)


def test_an_unknown_name_is_told_by_the_web_too() -> None:
    app = FastAPI()

    @app.post("/")
    def typed(body: Bounded) -> None:
        pass

    refusals.install(app)
    client = TestClient(app)
    error = client.post("/", json={"parts": [], "labels": {}, "é": 1}).json()["error"]
    assert (error["param"], error["message"]) == ("é", "unknown field '\\xe9': leave it out")
    assert client.post("/", json={"parts": [{}], "labels": {}}).status_code == 200
