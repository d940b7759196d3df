"""Endpoints of clients' sessions: settings of the client, sessions, their samplers, and results of promises."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from isthmus.common.bounded_values import brief
from isthmus.common.errors import DiskError
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.state.tables import BaseModel, TinkerModel, TinkerSampler, TinkerSession
from isthmus.daemon.tinker.endpoints.tinker_bodies import (
    checked_page,
    not_found,
    parsed,
    promised,
    read_body,
    read_json,
)
from isthmus.daemon.tinker.promises import FullError, NewPromise, Told, UnknownPromiseError, told_refusal
from isthmus.daemon.tinker.refusal import RefusalError
from isthmus.daemon.tinker.sampling_queue import MOST_SAMPLES
from isthmus.daemon.tinker.saved_weights import samplers_of
from isthmus.daemon.tinker.tinker_requests import End, NewSampler, NewSession, OfSession, Poll, Sample
from isthmus.daemon.tinker.tinker_service import Tinker
from isthmus.daemon.web.api_error import ApiError
from isthmus.daemon.web.context import Asker, Here

HOLD = 30.0
"""Seconds that a poll waits for a result; a client gives up after 45."""
MOST_SESSIONS = 10_000
"""Sessions, and samplers of one session, that an owner may have; old ones are removed after `keep_days`."""

sessions = APIRouter()

_EDGE = (
    "train_attn and train_mlp mean the layers of this machine; the cloud's layers stay as they are "
    "(training_layers in daemon.toml)."
)
_ALL = (
    "train_attn and train_mlp mean all layers; adapters of the cloud's layers are leased to it, and it sees their "
    "weights (training_layers in daemon.toml)."
)
_HEAD = "train_unembed beside them means the head only where it is not tied and on this machine."


def notice(settings: DaemonSettings) -> str:
    """What every client is told of what is trained here."""
    return f"{_ALL if settings.training_layers == 'all' else _EDGE} {_HEAD}"


@sessions.post("/client/config")
async def client_config(request: Request, here: Here, _owner: Asker) -> dict[str, Any]:
    """How a client should behave: chunks of data in order, since sums depend on it, and of bounded size."""
    await read_body(request)
    return {
        "parallel_fwdbwd_chunks": False,
        "fwdbwd_max_chunk_bytes_count": min(5_000_000, here.settings.body_mib * 2**20 // 2),
        "sample_max_concurrent_requests": here.settings.answers_waiting,
        "sample_use_retrieve_futures": False,
        "sample_enable_stuck_detection": False,  # a cloud that is away is waited for
        "custom_loss_server_side": False,
        "pjwt_auth_enabled": False,
    }


@sessions.post("/client/dynamic_config")
async def client_dynamic_config(request: Request, _owner: Asker) -> dict[str, Any]:
    """What a client asks again every few minutes."""
    await read_body(request)
    return {"sample_cancel_enabled": False}


@sessions.get("/healthz")
def healthz() -> dict[str, str]:
    """Whether the daemon answers."""
    return {"status": "ok"}


@sessions.get("/get_server_capabilities")
def capabilities(here: Here, _owner: Asker) -> dict[str, Any]:
    """The models that clouds serve."""
    with here.database.reading() as session:
        rows = session.scalars(select(BaseModel).order_by(BaseModel.name)).all()
    models = [
        {
            "model_name": row.name,
            "max_context_length": row.facts.get("longest"),
            "trainable": row.cloud in here.settings.clouds,
            "sampleable": row.cloud in here.settings.clouds,
        }
        for row in rows
    ]
    return {"supported_models": models}


@sessions.post("/telemetry")
async def telemetry(request: Request, here: Here, _owner: Asker) -> dict[str, str]:
    """Reports of the client's: they are dropped, and nothing leaves this machine."""
    await read_body(request, here.settings.body_mib << 20)
    return {"status": "accepted"}


@sessions.post("/create_session")
async def create_session(request: Request, here: Here, owner: Asker) -> dict[str, Any]:
    """Begin a session."""
    new = await read_json(request, NewSession)
    if new.project_id is not None:
        name = brief(new.project_id)
        problem = f"project_id = {name}: there are no projects here; leave it out (and TINKER_PROJECT_ID)"
        raise ApiError(400, problem, param="project_id")
    now = time.time()
    row = TinkerSession(
        id=str(uuid.uuid4()),
        owner=owner.id,
        labels={"user_metadata": new.user_metadata, "display_name": new.display_name, "tags": new.tags},
        created_at=now,
        seen_at=now,
    )

    def add() -> None:
        with here.database.session() as session:
            count = session.scalar(
                select(func.count()).select_from(TinkerSession).where(TinkerSession.owner == owner.id)
            )
            if (count or 0) >= MOST_SESSIONS:
                raise ApiError(400, f"there are {count} sessions already; old ones go after keep_days (daemon.toml)")
            session.add(row)

    await run_in_threadpool(add)
    return {"session_id": row.id, "type": "create_session", "warning_message": notice(here.settings)}


@sessions.post("/session_heartbeat")
async def session_heartbeat(request: Request, here: Here, owner: Asker) -> dict[str, str]:
    """Say that a client still lives."""
    session_id = (await read_json(request, OfSession)).session_id

    def note() -> None:
        with here.database.session() as session:
            row = own_session(session, owner.id, session_id)
            if row.ended:
                raise ApiError(410, f"session {session_id} has finished", code="session_finished")
            row.seen_at = time.time()

    await run_in_threadpool(note)
    return {"type": "session_heartbeat"}


@sessions.post("/sessions/{session_id}/finish", status_code=204)
async def finish_session(session_id: str, request: Request, here: Here, owner: Asker, tinker: Tinker) -> Response:
    """End a session; what it has saved stays."""
    await read_json(request, End)

    def end() -> list[str]:
        with here.database.session() as session:
            own_session(session, owner.id, session_id).ended = True
            return list(session.scalars(select(TinkerModel.id).where(TinkerModel.session == session_id)))

    for model in await run_in_threadpool(end):
        tinker.training.forget(model)
    return Response(status_code=204)


@sessions.get("/sessions")
def list_sessions(here: Here, owner: Asker, limit: int = 20, offset: int = 0) -> dict[str, Any]:
    """Ids of sessions, the newest first."""
    limit, offset = checked_page(limit, offset)
    query = select(TinkerSession.id).where(TinkerSession.owner == owner.id)
    with here.database.reading() as session:
        newest = query.order_by(TinkerSession.created_at.desc())
        return {"sessions": list(session.scalars(newest.limit(limit).offset(offset)))}


@sessions.get("/sessions/{session_id}")
def get_session(session_id: str, here: Here, owner: Asker) -> dict[str, Any]:
    """What a session has."""
    with here.database.reading() as session:
        row = own_session(session, owner.id, session_id)
        models = session.scalars(
            select(TinkerModel.id).where(TinkerModel.session == session_id).order_by(TinkerModel.created_at)
        )
        return {
            "training_run_ids": list(models),
            "sampler_ids": [sampler.id for sampler in samplers_of(session, owner.id, session_id)],
            "user_metadata": texts(row.labels.get("user_metadata")),
            "display_name": row.labels.get("display_name"),
        }


@sessions.post("/create_sampling_session")
async def create_sampling_session(request: Request, here: Here, owner: Asker, tinker: Tinker) -> dict[str, str]:
    """Something to sample from."""
    new = await read_json(request, NewSampler)
    sampler_id = sampler_name(new.session_id, new.sampling_session_seq_id)

    def add() -> None:
        with here.database.reading() as session:
            open_session(session, owner.id, new.session_id)
            if session.get(TinkerSampler, sampler_id) is not None:
                return  # the request came again
            if len(samplers_of(session, owner.id, new.session_id)) >= MOST_SESSIONS:
                raise ApiError(400, f"session {new.session_id} has {MOST_SESSIONS} samplers already: begin another")
        base = _base_of_sampler(new, tinker, owner.id)
        with here.database.session() as session:
            if session.get(BaseModel, base) is None:
                raise not_found("model", base)
            row = TinkerSampler(
                id=sampler_id,
                owner=owner.id,
                session=new.session_id,
                base=base,
                weights=new.model_path,
                created_at=time.time(),
            )
            session.merge(row)

    await run_in_threadpool(add)
    return {"sampling_session_id": sampler_id, "type": "create_sampling_session"}


@sessions.get("/samplers/{sampler_id}")
def get_sampler(sampler_id: str, here: Here, owner: Asker) -> dict[str, Any]:
    """What a sampler samples from."""
    with here.database.reading() as session:
        row = session.get(TinkerSampler, sampler_id)
    if row is None or row.owner != owner.id:
        raise not_found("sampler", sampler_id)
    return {"sampler_id": row.id, "base_model": row.base, "model_path": row.weights}


@sessions.post("/asample")
async def asample(request: Request, here: Here, owner: Asker, tinker: Tinker) -> Response:
    """Promise samples."""
    body: bytes | None = await read_body(request, here.settings.body_mib << 20)
    new = parsed(body or b"", Sample)
    sampler = await run_in_threadpool(get_sampler, new.sampling_session_id, here, owner)
    for name in ("base_model", "model_path"):
        if (asked := getattr(new, name)) not in {None, sampler[name]}:
            problem = (
                f"{name} = {brief(asked)}: the sampler has {sampler[name]!r}; leave it out, or make another sampler"
            )
            raise ApiError(400, problem, param=name)
    told: Told | None = None
    try:
        await run_in_threadpool(here.room.room_for, len(body or b""))
    except DiskError as error:
        told, body = told_refusal(RefusalError(str(error))), None
    scope = f"sampler/{new.sampling_session_id}"
    try:
        promise = await tinker.promise(NewPromise(owner.id, scope, str(new.seq_id), "asample", body=body, told=told))
    except FullError as error:
        raise ApiError(429, str(error), code="too_many_waiting") from error
    return promised(
        promise, sample_sequence_ids=[f"{promise.id}:{index}" for index in range(min(new.num_samples, MOST_SAMPLES))]
    )


@sessions.post("/retrieve_future")
async def retrieve_future(request: Request, owner: Asker, tinker: Tinker) -> Response:
    """The result of a promise, or "try_again"."""
    poll = await read_json(request, Poll)
    try:
        told = await tinker.promises.wait(owner.id, poll.request_id, HOLD)
    except UnknownPromiseError:
        raise not_found("request", poll.request_id) from None
    if told is not None:
        return Response(told.body, media_type=told.media_type)
    promise = await run_in_threadpool(tinker.promises.find, poll.request_id)
    model = None if promise is None else promise.model
    reason = tinker.sampling.reasons.get(poll.request_id) if model is None else tinker.training.reasons.get(model)
    body: dict[str, Any] = {"type": "try_again", "request_id": poll.request_id, "queue_state": "active"}
    if reason is not None:
        body |= {"queue_state": "paused_capacity", "queue_state_reason": reason}
    return JSONResponse(body)


def sampler_name(session_id: str, number: int) -> str:
    """The id of a session's sampler."""
    return f"{session_id}:sample:{number}"


def own_session(session: Session, owner: str, session_id: str) -> TinkerSession:
    """A session of an owner. Raises ApiError."""
    row = session.get(TinkerSession, session_id)
    if row is None or row.owner != owner:
        raise not_found("session", session_id)
    return row


def open_session(session: Session, owner: str, session_id: str) -> TinkerSession:
    """One that has not finished. Raises ApiError."""
    row = own_session(session, owner, session_id)
    if row.ended:
        raise ApiError(400, f"session {session_id} has finished: begin another", code="session_finished")
    return row


def texts(labels: dict[str, Any] | None) -> dict[str, str] | None:
    """A client's labels as the API tells them: texts."""
    if labels is None:
        return None
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in labels.items()}


def _base_of_sampler(new: NewSampler, tinker: Tinker, owner: str) -> str:
    if new.model_path is None:
        if new.base_model is None:
            raise ApiError(400, "give base_model or model_path", param="base_model")
        return new.base_model
    try:
        base = str(tinker.weights.needed(owner, new.model_path).facts["base"])
    except RefusalError as error:
        raise ApiError(404, str(error), param="model_path", code="not_found") from error
    if new.base_model not in {None, base}:
        raise ApiError(400, f"{new.model_path} belongs to {base}, not to {new.base_model}", param="base_model")
    return base
