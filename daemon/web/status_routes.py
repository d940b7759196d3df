"""How the daemon is: `/healthz` for watchers, which needs no token, and `/isthmus/v1/status`."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import time
from dataclasses import asdict
from typing import Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import APIRouter
from sqlalchemy import func, select

from isthmus.daemon.state.owners import FIRST
from isthmus.daemon.state.tables import BaseModel, Job, Owner
from isthmus.daemon.web.context import Asker, Context, Here

_STARTED = time.time()
_threads = CapacityLimiter(2)
"""The status has threads of its own: those of the other requests may all be taken."""
_COARSE = 1 << 30
"""Other owners than the first are told sizes of the disk in steps of so many bytes."""


def router() -> APIRouter:
    """The routes."""
    routes = APIRouter()
    routes.get("/healthz")(health)
    routes.get("/isthmus/v1/status")(status)
    return routes


async def health() -> dict[str, str]:
    """Answers while the daemon lives."""
    return {"status": "ok"}


async def status(here: Here, owner: Asker) -> dict[str, Any]:
    """What the daemon has and does; of jobs, the asker's own. What tells when others work, only the first owner has."""
    return await run_sync(_status, here, owner, limiter=_threads)


def _status(here: Context, owner: Owner) -> dict[str, Any]:
    with here.database.reading() as session:
        jobs = session.execute(select(Job.status, func.count()).where(Job.owner == owner.id).group_by(Job.status)).all()
        live = session.scalars(select(Job).where(Job.owner == owner.id, Job.status.in_(("queued", "running")))).all()
        models = session.scalars(select(BaseModel).order_by(BaseModel.name)).all()
    waiting = [{"job": job.id, **asdict(wait)} for job in live if (wait := here.jobs.waiting(job)) is not None]
    answers = dict(here.noted.answers)
    if "clouds" in answers:
        answers["clouds"] = here.noted.clouds(owner)
    if "hot" in answers:
        answers["hot"] = len(answers["hot"])  # their names are their owners'
    used, aside, free = here.room.used(), here.room.set_aside(), shutil.disk_usage(here.home.path).free
    if owner.name != FIRST:
        answers = {"clouds": answers.get("clouds", [])}
        used, aside = (-(-size // _COARSE) * _COARSE for size in (used, aside))
        free = free // _COARSE * _COARSE
    return {
        "version": importlib.metadata.version("isthmus"),
        "pid": os.getpid(),
        "started_at": _STARTED,
        "home": str(here.home.path),
        "owner": owner.name,
        "disk": {
            "used_bytes": used,
            "set_aside_bytes": aside,
            "most_bytes": here.room.most,
            "free_bytes": free,
        },
        "jobs": {row[0]: row[1] for row in jobs},
        "waiting": waiting,
        "clouds": sorted(here.settings.clouds),
        "models": [{"name": model.name, "cloud": model.cloud, "seen_at": model.seen_at} for model in models],
        "answers": answers,
    }
