"""OpenAI's published document, by schemathesis: a few cases of each operation; `openai_conformance` sends thousands."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient
from support.daemon.openai_conformance import OPERATIONS, Conformance, main
from support.daemon.openai_fakes import BASE, OpenAIDaemon
from support.daemon.openai_tally import Tally, missing, table

from isthmus.daemon.openai import job_routes
from isthmus.daemon.web.api_error import ApiError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def conformance(tmp_path_factory: pytest.TempPathFactory) -> Conformance:
    """The document, and a daemon of its own."""
    return Conformance(OpenAIDaemon(tmp_path_factory.mktemp("conformance") / "home"), seed=1)


def run(conformance: Conformance, label: str, cases: int) -> Tally:
    return conformance.run(next(each for each in conformance.operations() if each.label == label), cases)


LABELS = [f"{method.upper()} {path}" for path, methods in OPERATIONS.items() for method in methods]


@pytest.mark.parametrize("label", LABELS)
def test_an_operation_conforms(conformance: Conformance, label: str) -> None:
    tally = run(conformance, label, 10)
    assert (tally.failures, tally.errors) == ([], 0)
    assert len(tally.distinct) > 0
    assert missing({label: tally}, distinct=1, in_all=10) == []


@pytest.mark.long
def test_an_operation_that_takes_nothing_is_told_apart(conformance: Conformance) -> None:
    assert [label for label in LABELS if not run(conformance, label, 1).takes] == ["GET /models"]


def test_what_a_run_lacks_is_named() -> None:
    def tally(accepted: int, *, same: bool = False, **values: Any) -> Tally:
        made = Tally(statuses=Counter({200: accepted}), **values)
        for number in range(accepted):
            case = SimpleNamespace(
                path_parameters=None, query={"limit": 1 if same else number, "order": "asc"}, body={}
            )
            made.accept(case, mended=number % 2 == 1)
        return made

    def lacks(of: Tally, in_all: int = 0) -> str:
        return "\n".join(missing({"GET /files": of}, distinct=50, in_all=in_all))

    assert lacks(tally(50)) == ""
    assert "49 distinct cases were accepted" in lacks(tally(49))
    assert "1 distinct cases were accepted" in lacks(tally(60, same=True))
    assert lacks(tally(60, same=True, takes=False)) == ""
    assert "0 distinct cases were accepted, and 1 are wanted" in lacks(tally(0, takes=False))
    assert "50 cases were sent, and 51 are wanted" in lacks(tally(50), in_all=51)
    assert "1 cases failed" in lacks(tally(50, failures=["no x-request-id"]))
    broken = tally(50)
    broken.statuses[503] += 1
    assert "1 cases were answered by 5xx" in lacks(broken)
    shown = table({LABELS[9]: broken, "GET /models": tally(3, same=True, takes=False)})
    assert max(map(len, shown.splitlines())) <= 80
    assert "GET /models takes nothing" in shown
    assert broken.row() == {"cases": 51, "first": 25, "mended": 25, "distinct": 50, "5xx": 1, "fail": 0}


@pytest.mark.long
def test_the_command_ends_with_1_where_something_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--only", "GET /files/{file_id}/content", "--cases", "4", "--json"]
    assert main([*asked, "--distinct", "1"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["operations"]
    assert row["first"] + row["mended"] == row["distinct"] > 0
    assert main([*asked, "--distinct", "1", "--in-all", "1000"]) == 1
    assert json.loads(capsys.readouterr().out)["missing"] == [f"{row['cases']} cases were sent, and 1000 are wanted"]


def test_what_does_not_conform_is_noticed(conformance: Conformance, monkeypatch: pytest.MonkeyPatch) -> None:
    retrieve = "GET /fine_tuning/jobs/{fine_tuning_job_id}"
    told = job_routes.job_object

    def without_hyperparameters(*arguments: Any) -> dict[str, Any]:
        return {name: value for name, value in told(*arguments).items() if name != "hyperparameters"}

    with monkeypatch.context() as patch:
        patch.setattr(job_routes, "job_object", without_hyperparameters)
        assert any("hyperparameters" in failure for failure in run(conformance, retrieve, 4).failures)

    def fails(*_: Any) -> dict[str, Any]:
        raise RuntimeError("a defect")

    with monkeypatch.context() as patch:
        patch.setattr(job_routes, "job_object", fails)
        assert run(conformance, retrieve, 4).errors > 0

    def misleads(*_: Any) -> dict[str, Any]:
        raise ApiError(400, "no", param="nonsense")

    with monkeypatch.context() as patch:
        patch.setattr(job_routes, "job_object", misleads)
        assert any("not mended" in failure for failure in run(conformance, retrieve, 4).failures)


def test_a_stray_event_is_noticed(conformance: Conformance) -> None:
    def problem(*events: str) -> str | None:
        content = "".join(f"data: {event}\n\n" for event in events).encode()
        response = SimpleNamespace(headers={"content-type": ["text/event-stream"]}, content=content)
        return conformance._stray_event("POST /chat/completions", response)

    chunk = '{"id": "a", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []}'
    assert problem(chunk, "[DONE]") is None
    assert "the stream ends" in str(problem(chunk))
    assert '"choices" is a required property' in str(problem(chunk.replace("choices", "others"), "[DONE]"))
    assert "[DONE]" in str(problem("[DONE]", "[DONE]"))


def test_streams_conform_with_every_option(conformance: Conformance) -> None:
    """What valid cases that are drawn seldom ask for: streams with counts, log probabilities, several answers."""
    daemon = conformance.daemon
    client = TestClient(daemon.app, "http://127.0.0.1", headers={"authorization": f"Bearer {daemon.token}"})
    chat = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2}
    plain = {"prompt": ["a", "b"], "logprobs": 2}
    for path, body in (("/chat/completions", chat), ("/completions", plain)):
        for counted in (False, True):
            asked = {"model": BASE, "n": 2, "stream": True, "stream_options": {"include_usage": counted}, **body}
            answer = client.post(f"/v1{path}", json=asked)
            headers = {"content-type": [answer.headers["content-type"]]}
            response = SimpleNamespace(headers=headers, content=answer.content)
            assert (b'"total_tokens"' in answer.content) is counted
            assert conformance._stray_event(f"POST {path}", response) is None
