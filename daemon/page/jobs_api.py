"""The daemon's own API of jobs, under `/isthmus/v1/jobs`: every kind of job, and what OpenAI's API has no word for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from pydantic import Field, ValidationError
from sqlalchemy import select

from isthmus.daemon.jobs.job_names import MOST_SUFFIX
from isthmus.daemon.jobs.job_service import EVENT, MOST_PRIORITY, NewJob
from isthmus.daemon.jobs.job_specs import names_paths
from isthmus.daemon.jobs.kinds import MODE_OF
from isthmus.daemon.state.tables import Event, Job, Model, StoredFile
from isthmus.daemon.web.api_error import ApiError
from isthmus.daemon.web.bounded_body import BoundedBody, few
from isthmus.daemon.web.context import Asker, Here, OverUnixSocket
from isthmus.daemon.web.json_object import parse_object

After = Annotated[str | None, Query(max_length=64, description="The id before the first one.")]
Limit = Annotated[int, Query(ge=1, le=100, description="So many at most.")]
MOST_SETTINGS = 100
"""Of a job: more than any kind has."""
Label = Annotated[str, Field(max_length=512)]


class JobRequest(BoundedBody):
    """A job that is wanted; see `isthmus.daemon.jobs.job_service.NewJob`."""

    kind: Literal["train", "tune", "evaluate", "generate"]
    model: Annotated[str, Field(max_length=256)]
    spec: Annotated[dict[str, Any], few(MOST_SETTINGS)]
    labels: Annotated[dict[str, Label], few(16)] = Field(default_factory=dict)
    priority: Annotated[int, Field(ge=-MOST_PRIORITY, le=MOST_PRIORITY)] = 0
    suffix: Annotated[str, Field(max_length=MOST_SUFFIX)] = ""


async def job_request(request: Request) -> JobRequest:
    """The job that a request wants. Raises ApiError for what is no JSON object, RequestValidationError for others."""
    values = parse_object(await request.body())
    try:
        return JobRequest.model_validate(values)
    except ValidationError as error:
        wrong = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise RequestValidationError(wrong) from error


def router() -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/isthmus/v1/jobs")
    routes.get("")(list_jobs)
    routes.post("")(create)
    routes.get("/{job_id}")(show)
    routes.delete("/{job_id}")(remove)
    routes.get("/{job_id}/events")(events)
    routes.get("/{job_id}/checkpoints")(checkpoints)
    routes.get("/{job_id}/steps")(steps)
    routes.get("/{job_id}/result")(result)
    routes.post("/{job_id}/{action}")(change)
    return routes


def list_jobs(
    here: Here,
    owner: Asker,
    after: After = None,
    limit: Limit = 20,
    kind: Annotated[list[str] | None, Query(description="Only jobs of these kinds.")] = None,
) -> dict[str, Any]:
    """Jobs, the newest first."""
    jobs, more = here.jobs.list(owner.id, after=after, limit=limit, kinds=kind)
    return {"jobs": _trees(here, jobs), "has_more": more}


def create(
    here: Here,
    owner: Asker,
    over_unix_socket: OverUnixSocket,
    wanted: Annotated[JobRequest, Depends(job_request)],
) -> dict[str, Any]:
    """Put a job into the queue. The same request within a minute is the same job."""
    # Who connects to the Unix socket is this machine's user, who may read the files anyway; a token is not.
    if names_paths(wanted.spec) and not over_unix_socket:
        raise ApiError(400, "paths of files are taken over the Unix socket alone: upload the file, and give its id")
    job = here.jobs.create(
        owner.id,
        NewJob(
            wanted.kind,
            wanted.model,
            wanted.spec,
            request=wanted.model_dump(),
            labels=wanted.labels,
            priority=wanted.priority,
            suffix=wanted.suffix,
        ),
    )
    return _tree(here, job)


def show(here: Here, owner: Asker, job_id: str) -> dict[str, Any]:
    """A job."""
    return _tree(here, here.jobs.get(owner.id, job_id))


def remove(here: Here, owner: Asker, job_id: str) -> dict[str, Any]:
    """Delete a job that has ended, and what it has made."""
    here.jobs.delete(owner.id, job_id)
    return {"id": job_id, "deleted": True}


def change(
    here: Here, owner: Asker, job_id: str, action: Literal["cancel", "pause", "resume", "retry"]
) -> dict[str, Any]:
    """Cancel, pause, resume or retry a job."""
    ways = {
        "cancel": here.jobs.cancel,
        "pause": here.jobs.pause,
        "resume": here.jobs.resume,
        "retry": here.jobs.retry,
    }
    return _tree(here, ways[action](owner.id, job_id))


def events(here: Here, owner: Asker, job_id: str, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    """Events, the newest first."""
    found, more = here.jobs.events(owner.id, job_id, after=after, limit=limit)
    return {"events": [_event(event) for event in found], "has_more": more}


def checkpoints(here: Here, owner: Asker, job_id: str, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    """Checkpoints that can be talked to, the newest first."""
    found, more = here.jobs.checkpoints(owner.id, job_id, after=after, limit=limit)
    trees = [
        {"id": model.id, "model": model.name, "step": model.step, "metrics": model.metrics, "at": model.created_at}
        for model in found
    ]
    return {"checkpoints": trees, "has_more": more}


def steps(
    here: Here,
    owner: Asker,
    job_id: str,
    after: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> dict[str, Any]:
    """Lines of a training's log after step `after`, the oldest first."""
    return {"steps": list(here.jobs.steps(owner.id, job_id, after=after, limit=limit))}


def result(here: Here, owner: Asker, job_id: str) -> FileResponse:
    """The bytes of a job's result: a training's figures (CSV), an evaluation (JSON), or answers (JSON Lines)."""
    job = here.jobs.get(owner.id, job_id)
    with here.database.reading() as session:
        stored = session.get(StoredFile, job.results[0]) if job.results else None
    if stored is None:
        raise ApiError(404, f"{job_id} is {job.status} and has no result", code="not_found")
    return FileResponse(here.home.file(stored.id), filename=stored.filename, media_type="application/octet-stream")


def _tree(here: Here, job: Job) -> dict[str, Any]:
    return _trees(here, [job])[0]


def _trees(here: Here, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Jobs as clients see them. Times are seconds since 1970, and lengths of time are seconds."""
    wanted = [job.id for job in jobs]
    with here.database.reading() as session:
        rows = session.scalars(
            select(Model).where(Model.job.in_(wanted), Model.step.is_(None), Model.deleted.is_(False))
        ).all()
    tuned = {model.job: model for model in rows}
    trees = []
    for job in jobs:
        model = tuned.get(job.id)
        left, waiting = None, here.jobs.waiting(job)
        if waiting is None and job.status == "running" and job.speed is not None and job.total is not None:
            left = job.speed * (job.total - job.step)
        trees.append(
            {
                "id": job.id,
                "kind": job.kind,
                "mode": MODE_OF.get(job.kind),
                "status": job.status,
                "wanted": job.wanted,
                "waiting": None if waiting is None else asdict(waiting),
                "model": job.model,
                "tuned_model": None if model is None else model.name,
                "adapter": None if model is None else str(here.home.path / model.folder),
                "suffix": job.suffix,
                "spec": job.spec,
                "labels": job.labels,
                "priority": job.priority,
                "created_at": job.created_at,
                "started_at": job.started_at,
                "finished_at": job.finished_at,
                "step": job.step,
                "total": job.total,
                "bytes_up": job.bytes_up,
                "bytes_down": job.bytes_down,
                "seconds_per_step": job.speed,
                "seconds_left": left,
                "estimated_finish": None if left is None else time.time() + left,
                "attempts": job.attempts,
                "error": job.error,
                "results": job.results,
            }
        )
    return trees


def _event(event: Event) -> dict[str, Any]:
    return {
        "id": f"{EVENT}{event.number}",
        "at": event.created_at,
        "level": event.level,
        "kind": event.kind,
        "message": event.message,
        "data": event.data,
    }
