"""OpenAI's published document, by schemathesis: a few cases of each operation; `openai_conformance` sends thousands."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from support.daemon.openai_conformance import OPERATIONS, Conformance, Tally
from support.daemon.openai_fakes import OpenAIDaemon

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
    assert tally.accepted > 0


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
