"""Jobs, events and checkpoints as OpenAI's API tells them.

A job's status is one that the SDK's strict validation takes, and `paused` is none of these. A paused job is told as
"queued": it does not run, it has not ended, and it goes on from where it is once it is its turn again, so that a script
which waits for the end goes on to wait. The truth is in the event of the pause, and in `isthmus.status`, a field that
the document does not have and that both kinds of validation let pass.

`hyperparameters` are numbers: "auto" is decided when the job is made (`isthmus.daemon.openai.training_files`). Only
what a package's advice decides, once it is fetched, stays "auto".
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from isthmus.daemon.jobs.job_rows import ENDED
from isthmus.daemon.jobs.job_runner import Waiting
from isthmus.daemon.jobs.job_service import EVENT
from isthmus.daemon.jobs.kinds import MODE_OF
from isthmus.daemon.openai.training_files import hyperparameters_of
from isthmus.daemon.state.tables import Event, Job, Model

_STATUS = {"paused": "queued"}
_METRICS = (
    "step",
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)


def jobs_under_way(session: Session) -> Sequence[Job]:
    """The jobs, of all owners, that have not ended."""
    return session.scalars(select(Job).where(Job.status.not_in(ENDED))).all()


def results_of(session: Session, jobs: Sequence[Job]) -> dict[str | None, str]:
    """The names of the models that jobs have made, by the jobs' ids."""
    found = select(Model.job, Model.name).where(Model.job.in_([job.id for job in jobs]), Model.step.is_(None))
    return {row.job: row.name for row in session.execute(found)}


def job_object(job: Job, result: str | None, waiting: Waiting | None = None) -> dict[str, Any]:
    """A job as the API tells it.

    Args:
        job: The job.
        result: The name of the model that it made.
        waiting: The cloud that it waits for, where it does: `isthmus.waiting` says it, and no end is estimated.
    """
    numbers = hyperparameters_of(job.spec, advised=job.kind == "tune")
    ended = None if job.finished_at is None else int(job.finished_at)
    left = None
    if waiting is None and job.status == "running" and job.speed is not None and job.total is not None:
        left = int(time.time() + (job.total - job.step) * job.speed)
    error = job.error and {"code": f"isthmus_{job.error['code']}", "message": job.error["message"], "param": None}
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "error": error or None,
        "estimated_finish": left,
        "fine_tuned_model": result if job.status == "succeeded" else None,
        "finished_at": ended,
        "hyperparameters": numbers,
        "integrations": [],
        "isthmus": {
            **{"mode": MODE_OF[job.kind], "status": job.status, "step": job.step, "total": job.total},
            **{"bytes_up": job.bytes_up, "bytes_down": job.bytes_down},
        }
        | ({} if waiting is None else {"waiting": asdict(waiting)}),
        "metadata": job.labels or None,
        "method": {"type": "supervised", "supervised": {"hyperparameters": numbers}},
        "model": job.request.get("model", job.model),
        "organization_id": job.owner,
        "result_files": job.results,
        "seed": job.spec.get("seed", 0),
        "status": _STATUS.get(job.status, job.status),
        "trained_tokens": None,
        "training_file": job.request.get("training_file") or job.spec.get("data", ""),
        "validation_file": job.request.get("validation_file") or job.spec.get("validation"),
    }


def event_object(event: Event) -> dict[str, Any]:
    """An event as the API tells it."""
    return {
        "id": f"{EVENT}{event.number}",
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at),
        "level": event.level,
        "message": event.message,
        "type": event.kind,
        "data": event.data,
    }


def checkpoint_object(model: Model) -> dict[str, Any]:
    """A checkpoint as the API tells it."""
    return {
        "id": model.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(model.created_at),
        "fine_tuned_model_checkpoint": model.name,
        "fine_tuning_job_id": model.job,
        "metrics": {name: model.metrics[name] for name in _METRICS if model.metrics.get(name) is not None},
        "step_number": model.step or 0,
    }
