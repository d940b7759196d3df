"""`/v1/fine_tuning/jobs`; what a job may be is in `isthmus.daemon.openai.job_bodies`.

What a job's state does not allow is a 400: the SDK repeats a request after 409.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from sqlalchemy.orm import Session

from isthmus.common.bounded_values import shown
from isthmus.daemon.jobs.job_service import NewJob, UnknownJobError
from isthmus.daemon.jobs.kinds import TRAINING
from isthmus.daemon.openai.job_bodies import LEAVE_OUT, PACKAGE, PUBLIC, JobBody
from isthmus.daemon.openai.job_objects import checkpoint_object, event_object, job_object, results_of
from isthmus.daemon.openai.model_names import target_named
from isthmus.daemon.openai.request_fields import Fields, NoQuery, checked, json_body, query
from isthmus.daemon.openai.training_files import LONGEST_EXAMPLE, settings_of
from isthmus.daemon.state.tables import BaseModel, Job, StoredFile
from isthmus.daemon.web.api_error import ApiError
from isthmus.daemon.web.context import Asker, Context, Here

routes = APIRouter(prefix="/fine_tuning/jobs")
_LABEL, _NO_LABELS = "metadata[", "metadata"


class Page(Fields, strict=False):
    """Which part of a list is wanted."""

    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=1000)] = 20


class CheckpointPage(Page):
    """Which checkpoints are wanted."""

    limit: Annotated[int, Field(ge=1, le=1000)] = 10


@routes.post("")
def create_job(here: Here, asker: Asker, body: Annotated[JobBody, Depends(json_body(JobBody))]) -> Any:
    """Put a job into the queue."""
    with here.database.reading() as session:
        target = target_named(session, here.home, asker.id, body.model)
        base = session.get(BaseModel, target.base)
        training = _file(session, asker.id, body.training_file, "training_file")
        validation = (
            _file(session, asker.id, body.validation_file, "validation_file")
            if body.validation_file is not None
            else None
        )
        public = _file(session, asker.id, body.private[PUBLIC], "metadata") if PUBLIC in body.private else None
    facts: Mapping[str, Any] = {} if base is None else base.facts
    examples = _examples(training, "training_file", facts)
    spec: dict[str, Any] = {
        "data": training.id,
        "format": "jsonl",
        "seed": secrets.randbelow(2**31) if body.seed is None else body.seed,
        "max_length": min(int(facts.get("longest") or LONGEST_EXAMPLE), LONGEST_EXAMPLE),
        **settings_of(body.numbers, examples, advised=body.kind == "tune"),
    }
    if validation is None:
        spec["validation_split"] = 0
    else:
        _examples(validation, "validation_file", facts)
        spec["validation"] = validation.id
    if PACKAGE in body.private:
        spec["package"] = body.private[PACKAGE]
    if public is not None:
        spec |= {"public": public.id, "leave_out_shared": body.private.get(LEAVE_OUT) == "true"}
    if target.adapter is not None:
        spec["start_from"] = body.model
    new = NewJob(
        body.kind,
        target.base,
        spec,
        request=body.model_dump(mode="json", exclude_unset=True),
        labels=body.metadata or {},
        suffix=body.suffix or "",
    )
    return _told(here, here.jobs.create(asker.id, new))


@routes.get("")
def list_jobs(request: Request, here: Here, asker: Asker) -> Any:
    """Jobs, the newest first; `metadata[k]=v` asks for those with this pair, `metadata=null` for those without any."""
    labels: dict[str, str] | None = None
    others: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name.startswith(_LABEL):
            key = name.removeprefix(_LABEL).removesuffix("]")
            if not (name.endswith("]") and key) or "[" in key or "]" in key or key in (labels or {}):
                raise ApiError(400, f"{shown(name)}: give metadata[key]=value, each key once", param=name[:200])
            labels = {**(labels or {}), key: value}
        elif name == _NO_LABELS and value in ("", "null"):
            labels = labels or {}
        else:
            others[name] = value
    page = checked(Page, others)
    with _known(page.after):
        jobs, more = here.jobs.list(asker.id, after=page.after, limit=page.limit, labels=labels, kinds=TRAINING)
    with here.database.reading() as session:
        results = results_of(session, jobs)
    data = [job_object(job, results.get(job.id), here.jobs.waiting(job)) for job in jobs]
    return {"object": "list", "data": data, "has_more": more}


@routes.get("/{job_id}")
def retrieve_job(here: Here, asker: Asker, job_id: str, _: NoQuery) -> Any:
    """One job."""
    return _told(here, _job(here, asker.id, job_id))


@routes.post("/{job_id}/cancel")
def cancel_job(here: Here, asker: Asker, job_id: str, _: NoQuery) -> Any:
    """End a job; what it has trained stays as its newest checkpoint."""
    return _change(here, asker.id, job_id, here.jobs.cancel)


@routes.post("/{job_id}/pause")
def pause_job(here: Here, asker: Asker, job_id: str, _: NoQuery) -> Any:
    """Stop a job until it is resumed."""
    return _change(here, asker.id, job_id, here.jobs.pause)


@routes.post("/{job_id}/resume")
def resume_job(here: Here, asker: Asker, job_id: str, _: NoQuery) -> Any:
    """Go on with a paused job, once it is its turn."""
    return _change(here, asker.id, job_id, here.jobs.resume)


@routes.get("/{job_id}/events")
def list_events(here: Here, asker: Asker, job_id: str, page: Annotated[Page, Depends(query(Page))]) -> Any:
    """What has happened to a job, the newest first."""
    _job(here, asker.id, job_id)
    with _known(page.after):
        events, more = here.jobs.events(asker.id, job_id, after=page.after, limit=page.limit)
    return {"object": "list", "data": [event_object(event) for event in events], "has_more": more}


@routes.get("/{job_id}/checkpoints")
def list_checkpoints(
    here: Here, asker: Asker, job_id: str, page: Annotated[CheckpointPage, Depends(query(CheckpointPage))]
) -> Any:
    """What can be talked to of a job, while it runs and afterwards, the newest first."""
    _job(here, asker.id, job_id)
    with _known(page.after):
        models, more = here.jobs.checkpoints(asker.id, job_id, after=page.after, limit=page.limit)
    data = [checkpoint_object(model) for model in models]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": data, **ends, "has_more": more}


def _file(session: Session, owner: str, file_id: str, param: str) -> StoredFile:
    file = session.get(StoredFile, file_id)
    if file is None or file.owner != owner:
        raise ApiError(
            400, f"{param} = {shown(file_id)} is no file: upload it first", param=param, code="file_not_found"
        )
    if file.purpose != "fine-tune":
        raise ApiError(
            400, f"{param} = {file_id!r} has the purpose {file.purpose!r}: upload it with 'fine-tune'", param=param
        )
    return file


def _examples(file: StoredFile, param: str, facts: Mapping[str, Any]) -> int:
    """How many examples a file has, by what was found when it came. Raises ApiError where the model cannot have it."""
    if file.examples is None:
        raise ApiError(400, f"{param} = {file.id!r} was not checked as it came: upload it again", param=param)
    if file.chats and facts.get("chat_template") is False:
        raise ApiError(
            400,
            f"{param} = {file.id!r} holds messages, and the model has no chat template: give prompt and completion",
            param=param,
        )
    return file.examples


def _job(here: Context, owner: str, job_id: str) -> Job:
    job = here.jobs.get(owner, job_id)
    if job.kind not in TRAINING:
        raise ApiError(404, f"{job_id!r} is no fine-tuning job: its kind is {job.kind}", code="job_not_found")
    return job


def _change(here: Context, owner: str, job_id: str, change: Callable[[str, str], Job]) -> Any:
    _job(here, owner, job_id)
    return _told(here, change(owner, job_id))


@contextmanager
def _known(after: str | None) -> Iterator[None]:
    """Tell a list's `after` that is unknown apart from a job that is."""
    try:
        yield
    except UnknownJobError as error:
        if after is None:
            raise
        raise ApiError(400, f"after = {shown(after)} is not in this list", param="after") from error


def _told(here: Context, job: Job) -> dict[str, Any]:
    with here.database.reading() as session:
        return job_object(job, results_of(session, [job]).get(job.id), here.jobs.waiting(job))
