"""Endpoints that tell what there is: training runs, checkpoints; and those that are refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request, Response
from sqlalchemy import func, select
from starlette.concurrency import run_in_threadpool

from isthmus.daemon.state.tables import TinkerModel, TinkerWeights
from isthmus.daemon.tinker.endpoints.session_routes import texts
from isthmus.daemon.tinker.endpoints.tinker_bodies import checked_page, read_json
from isthmus.daemon.tinker.endpoints.training_routes import own_model
from isthmus.daemon.tinker.refusal import RefusalError
from isthmus.daemon.tinker.saved_weights import SAMPLER_WEIGHTS, WEIGHTS
from isthmus.daemon.tinker.tinker_requests import Expiry, OfWeights
from isthmus.daemon.tinker.tinker_service import Tinker, TinkerService
from isthmus.daemon.web.api_error import ApiError
from isthmus.daemon.web.context import Asker, Here

listing = APIRouter()


@listing.get("/training_runs")
def training_runs(here: Here, owner: Asker, tinker: Tinker, limit: int = 20, offset: int = 0) -> dict[str, Any]:
    """Models that were trained, the newest first."""
    limit, offset = checked_page(limit, offset)
    mine = TinkerModel.owner == owner.id
    with here.database.reading() as session:
        total = session.scalar(select(func.count()).select_from(TinkerModel).where(mine)) or 0
        query = select(TinkerModel).where(mine).order_by(TinkerModel.created_at.desc()).limit(limit).offset(offset)
        rows = session.scalars(query).all()
    return {
        "training_runs": [_training_run(row, tinker) for row in rows],
        "cursor": {"offset": offset, "limit": limit, "total_count": total},
    }


@listing.get("/training_runs/{model_id}")
def training_run(model_id: str, here: Here, owner: Asker, tinker: Tinker) -> dict[str, Any]:
    """A model that was trained."""
    with here.database.reading() as session:
        row = own_model(session, owner.id, model_id)
    return _training_run(row, tinker)


@listing.get("/training_runs/{model_id}/checkpoints")
def checkpoints_of_run(model_id: str, owner: Asker, tinker: Tinker) -> dict[str, Any]:
    """What was saved of a model, which may be gone itself."""
    return {"checkpoints": [_checkpoint(row) for row in tinker.weights.of(owner.id, model_id)]}


@listing.delete("/training_runs/{model_id}/checkpoints/{checkpoint_id:path}", status_code=204)
def delete_checkpoint(model_id: str, checkpoint_id: str, owner: Asker, tinker: Tinker) -> Response:
    """Remove saved weights."""
    if checkpoint_id.endswith("/publish"):
        raise refused("publishing")
    try:
        tinker.weights.delete(owner.id, f"tinker://{model_id}/{checkpoint_id}")
    except RefusalError as error:
        raise _as_api_error(error) from error
    return Response(status_code=204)


@listing.put("/training_runs/{model_id}/checkpoints/{checkpoint_id:path}/ttl", status_code=204)
async def expire_checkpoint(
    model_id: str, checkpoint_id: str, request: Request, owner: Asker, tinker: Tinker
) -> Response:
    """Say when saved weights are removed."""
    seconds = (await read_json(request, Expiry)).ttl_seconds
    try:
        await run_in_threadpool(tinker.weights.expire, owner.id, f"tinker://{model_id}/{checkpoint_id}", seconds)
    except RefusalError as error:
        raise _as_api_error(error) from error
    return Response(status_code=204)


@listing.get("/checkpoints")
def checkpoints(owner: Asker, tinker: Tinker, limit: int = 100, offset: int = 0) -> dict[str, Any]:
    """All that an owner has saved, the newest first."""
    limit, offset = checked_page(limit, offset)
    rows = tinker.weights.of(owner.id)
    return {
        "checkpoints": [_checkpoint(row) for row in rows[offset : offset + limit]],
        "cursor": {"offset": offset, "limit": limit, "total_count": len(rows)},
    }


@listing.post("/weights_info")
async def weights_info(request: Request, owner: Asker, tinker: Tinker) -> dict[str, Any]:
    """What saved weights belong to."""
    path = (await read_json(request, OfWeights)).tinker_path
    row = await run_in_threadpool(tinker.weights.find, owner.id, path)
    if row is None:
        raise ApiError(404, f"there are no weights at {path}", param="tinker_path", code="not_found")
    settings = row.facts["settings"]
    return {
        "base_model": row.facts["base"],
        "is_lora": True,
        "lora_rank": settings["rank"],
        "train_unembed": settings["train_unembed"],
        "train_mlp": settings["train_mlp"],
        "train_attn": settings["train_attn"],
    }


def refused(what: str) -> ApiError:
    """The error for something that this daemon does not do."""
    return ApiError(400, f"{what} is not offered: everything stays with this daemon", code="not_offered")


_REFUSED = {
    "POST": {
        "create_custom_loss": "uploading code",
        "copy_weights": "copying weights between projects",
        "save_weights_external": "exporting weights",
        "training_runs/{model_id}/checkpoints/{rest:path}": "publishing",
        "sessions/search": "searching sessions",
        "auth/token": "exchanging tokens",
        "join_sampling_session": "joining a sampling session",
        "retrieve_futures": "asking for several results at once",
        "cancel_future": "cancelling a request",
    },
    "GET": {
        "training_runs/{model_id}/checkpoints/{rest:path}": "downloading weights by a link",
        "audit": "an audit log",
        "billing/{rest:path}": "billing",
        "sessions/{session_id}/trace_export": "exporting traces",
    },
    "PUT": {"sessions/{session_id}/project": "projects"},
}


def add_refusals(router: APIRouter) -> None:
    """Refuse by name what the API has and this daemon does not. To be added behind everything else."""
    for method, paths in _REFUSED.items():
        for path, what in paths.items():
            router.add_api_route(f"/{path}", _refuser(what), methods=[method])


def _refuser(what: str) -> Any:
    def refuse(_owner: Asker) -> None:
        raise refused(what)

    return refuse


def _as_api_error(error: RefusalError) -> ApiError:
    missing = str(error).startswith("there are no")
    return ApiError(404 if missing else 400, str(error), code="not_found" if missing else "in_use")


def _training_run(row: TinkerModel, tinker: TinkerService) -> dict[str, Any]:
    saved = tinker.weights.of(row.owner, row.id)
    return {
        "training_run_id": row.id,
        "base_model": row.base,
        "model_owner": row.owner,
        "is_lora": True,
        "lora_rank": row.settings["rank"],
        "last_request_time": _time(row.seen_at),
        "last_checkpoint": _newest(saved, WEIGHTS),
        "last_sampler_checkpoint": _newest(saved, SAMPLER_WEIGHTS),
        "user_metadata": texts(row.settings.get("labels")),
    }


def _newest(rows: Sequence[TinkerWeights], kind: str) -> dict[str, Any] | None:
    return next((_checkpoint(row) for row in rows if row.kind == kind), None)


def _checkpoint(row: TinkerWeights) -> dict[str, Any]:
    return {
        "checkpoint_id": row.path.removeprefix(f"tinker://{row.model}/"),
        "checkpoint_type": "training" if row.kind == WEIGHTS else "sampler",
        "time": _time(row.created_at),
        "tinker_path": row.path,
        "size_bytes": row.size,
        "public": False,
        "user_metadata": texts(row.facts.get("labels")),
        "expires_at": None if row.expires_at is None else _time(row.expires_at),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
