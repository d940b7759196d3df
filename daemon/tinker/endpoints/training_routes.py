"""Endpoints that train: models, gradients, steps, saved weights. All but `get_info` promise a result."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from isthmus.common.bounded_values import brief
from isthmus.common.errors import DiskError
from isthmus.daemon.state.tables import BaseModel, TinkerModel, TinkerSession
from isthmus.daemon.tinker.endpoints.session_routes import open_session, sampler_name
from isthmus.daemon.tinker.endpoints.tinker_bodies import not_found, promised, read_body, read_json
from isthmus.daemon.tinker.promises import FullError, NewPromise, told_refusal
from isthmus.daemon.tinker.refusal import RefusalError
from isthmus.daemon.tinker.saved_weights import checked_name
from isthmus.daemon.tinker.tinker_requests import (
    AdamParams,
    LoadWeights,
    NewModel,
    OfModel,
    SaveForSampler,
    SaveWeights,
    Step,
)
from isthmus.daemon.tinker.tinker_service import Tinker, TinkerService
from isthmus.daemon.tinker.wire_bodies import PROTOBUF, BodyError, read_heading, unpacked
from isthmus.daemon.web.api_error import ApiError
from isthmus.daemon.web.context import Asker, Context, Here

MOST_MODELS = 16
"""Models of an owner whose sessions live."""
_ALIVE = 600.0  # seconds since a session's last sign
_ADAM = "adamw"

training = APIRouter()


@training.post("/create_model")
async def create_model(request: Request, here: Here, owner: Asker, tinker: Tinker) -> Response:
    """Promise a new model of a session."""
    new = await read_json(request, NewModel)

    def row() -> TinkerModel:
        _check_optimizer(new.optimizer_config)
        if new.lora_config is None:
            raise RefusalError("lora_config is missing: only adapters are trained here")
        lora = new.lora_config
        if not (lora.train_attn or lora.train_mlp or lora.train_unembed):
            raise RefusalError("nothing is to be trained: train_attn, train_mlp and train_unembed are all false")
        settings = lora.model_dump(exclude={"type"}) | {"layers": here.settings.training_layers}
        if lora.seed is None:
            settings["seed"] = secrets.randbits(31)  # drawn once, so that a model made again is the same
        return _new_model(owner.id, new.session_id, new.model_seq_id, new.base_model, settings, new.user_metadata)

    promise = NewPromise(
        owner=owner.id, scope=f"session/{new.session_id}", key=str(new.model_seq_id), kind="create_model"
    )
    return await _promise_model(here, tinker, promise, row, new.session_id)


@training.post("/get_info")
async def get_info(request: Request, here: Here, owner: Asker) -> dict[str, Any]:
    """What a model is."""
    model_id = (await read_json(request, OfModel)).model_id

    def look() -> tuple[TinkerModel, BaseModel | None]:
        with here.database.reading() as session:
            row = own_model(session, owner.id, model_id)
            return row, session.get(BaseModel, row.base)

    row, base = await run_in_threadpool(look)
    return {
        "type": "get_info",
        "model_data": {
            "arch": None if base is None else base.facts.get("arch"),
            "model_name": row.base,
            "tokenizer_id": row.base,
        },
        "model_id": row.id,
        "model_name": row.base,
        "is_lora": True,
        "lora_rank": row.settings["rank"],
    }


@training.post("/forward_backward")
async def forward_backward(request: Request, here: Here, owner: Asker, tinker: Tinker) -> Response:
    """Promise the gradients of some data, or the losses alone."""
    most = here.settings.body_mib << 20
    if (found := request.headers.get("content-type", "")).split(";")[0].strip() != PROTOBUF:
        raise ApiError(400, f"content-type {found!r} is not read here: send {PROTOBUF}", code="invalid_body")
    packed = await read_body(request, most)
    try:
        body = await run_in_threadpool(unpacked, packed, request.headers.get("content-encoding"), most)
        heading = await run_in_threadpool(read_heading, body)
    except BodyError as error:
        raise ApiError(400, str(error), code="invalid_body") from error
    if heading.seq < 1:
        raise ApiError(400, f"seq_id = {heading.seq}: from 1 on", param="seq_id")
    kind = "forward" if heading.forward_only else "forward_backward"
    return await _promise(here, tinker, owner.id, heading.model, heading.seq, kind, body=body)


@training.post("/optim_step")
async def optim_step(request: Request, here: Here, owner: Asker, tinker: Tinker) -> Response:
    """Promise a step of Adam with the gradients so far."""
    new = await read_json(request, Step)

    def values() -> dict[str, Any]:
        if new.optimizer_params is not None:
            raise RefusalError(f"optimizer {brief(new.optimizer_params.get('type'))} is not offered: send AdamParams")
        try:
            adam = AdamParams.model_validate(new.adam_params or {})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise RefusalError(f"adam_params.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        return {"adam": adam.model_dump(exclude={"type"})}

    return await _promise(here, tinker, owner.id, new.model_id, new.seq_id, "optim_step", values)


@training.post("/save_weights")
async def save_weights(request: Request, here: Here, owner: Asker, tinker: Tinker) -> Response:
    """Promise to save a model with its optimizer."""
    new = await read_json(request, SaveWeights)

    def values() -> dict[str, Any]:
        return _saving(new.path or f"{new.seq_id:06d}", new.ttl_seconds, new.user_metadata, overwrite=new.overwrite)

    return await _promise(here, tinker, owner.id, new.model_id, new.seq_id, "save_weights", values)


@training.post("/save_weights_for_sampler")
async def save_weights_for_sampler(request: Request, here: Here, owner: Asker, tinker: Tinker) -> Response:
    """Promise to save a model to sample from it."""
    new = await read_json(request, SaveForSampler)

    def values() -> dict[str, Any]:
        if new.kind != "snapshot":
            raise RefusalError(f"kind = {brief(new.kind)} is not offered: save a snapshot each time")
        if new.path is None and new.sampling_session_seq_id is not None:
            number = new.sampling_session_seq_id
            found = _saving(f"sampler-{number}", new.ttl_seconds, new.user_metadata, overwrite=True)
            return found | {"sampler": sampler_name(new.model_id.rpartition(":train:")[0], number)}
        return _saving(new.path or f"{new.seq_id:06d}", new.ttl_seconds, new.user_metadata, overwrite=False)

    return await _promise(here, tinker, owner.id, new.model_id, new.seq_id, "save_weights_for_sampler", values)


@training.post("/load_weights")
async def load_weights(request: Request, here: Here, owner: Asker, tinker: Tinker) -> Response:
    """Promise to load saved weights, into a model or into a new one."""
    new = await read_json(request, LoadWeights)
    values = {"path": new.path, "optimizer": new.optimizer}

    def check() -> dict[str, Any]:
        _check_optimizer(new.optimizer_config)
        if new.weights_access_token is not None:
            raise RefusalError("weights_access_token is not offered: an owner loads his own weights")
        return values

    if new.model_id is not None and new.seq_id is not None and new.session_id is None:
        return await _promise(here, tinker, owner.id, new.model_id, new.seq_id, "load_weights", check)
    if new.session_id is None or new.model_seq_id is None or new.model_id is not None:
        raise ApiError(400, "give model_id and seq_id, or session_id and model_seq_id")
    session_id, number = new.session_id, new.model_seq_id

    def row() -> TinkerModel:
        check()
        found = tinker.weights.needed(owner.id, new.path)
        base = found.facts["base"]
        if new.base_model not in {None, base}:
            raise RefusalError(f"{new.path} belongs to {base}, not to {new.base_model}")
        return _new_model(owner.id, session_id, number, base, found.facts["settings"], new.user_metadata)

    promise = NewPromise(
        owner=owner.id, scope=f"session/{session_id}", key=str(number), kind="load_weights", request=values
    )
    return await _promise_model(here, tinker, promise, row, session_id)


def own_model(session: Session, owner: str, model_id: str) -> TinkerModel:
    """A model of an owner. Raises ApiError."""
    row = session.get(TinkerModel, model_id)
    if row is None or row.owner != owner:
        raise not_found("model", model_id)
    return row


async def _promise(
    here: Context,
    tinker: TinkerService,
    owner: str,
    model_id: str,
    seq: int,
    kind: str,
    values: Callable[[], dict[str, Any]] = dict,
    body: bytes | None = None,
) -> Response:
    """Promise something of a model; what is wrong with its values is the promise's answer."""

    def check() -> None:
        with here.database.session() as session:
            row = own_model(session, owner, model_id)
            open_session(session, owner, row.session)
            row.seen_at = time.time()

    await run_in_threadpool(check)
    told, request = None, {}
    try:
        request = values()
        await run_in_threadpool(here.room.room_for, len(body or b""))
    except RefusalError as error:
        told, body = told_refusal(error), None
    except DiskError as error:
        told, body = told_refusal(RefusalError(str(error))), None
    promise = NewPromise(owner, f"model/{model_id}", str(seq), kind, model_id, request, body, told)
    try:
        return promised(await tinker.promise(promise))
    except FullError as error:
        raise ApiError(429, str(error), code="too_many_waiting") from error


async def _promise_model(
    here: Context, tinker: TinkerService, promise: NewPromise, row: Callable[[], TinkerModel], session_id: str
) -> Response:
    """Promise a model of a session; what is wrong with it is the promise's answer."""

    def make() -> TinkerModel | RefusalError:
        with here.database.reading() as session:
            open_session(session, promise.owner, session_id)
        try:
            made = row()
            with here.database.reading() as session:
                _check_base(session, here, made.base)
                _check_room(session, made)
        except RefusalError as error:
            return error
        return made

    made = await run_in_threadpool(make)
    if isinstance(made, RefusalError):
        new, add = NewPromise(promise.owner, promise.scope, promise.key, promise.kind, told=told_refusal(made)), None
    else:
        model = made
        new = NewPromise(promise.owner, promise.scope, promise.key, promise.kind, model.id, promise.request)

        def add(session: Session) -> None:
            session.add(model)

    try:
        return promised(await tinker.promise(new, add))
    except FullError as error:
        raise ApiError(429, str(error), code="too_many_waiting") from error


def _new_model(
    owner: str, session_id: str, number: int, base: str, settings: dict[str, Any], labels: dict[str, Any] | None
) -> TinkerModel:
    now = time.time()
    return TinkerModel(
        id=f"{session_id}:train:{number}",
        owner=owner,
        session=session_id,
        base=base,
        settings=settings | {"labels": labels},
        created_at=now,
        seen_at=now,
        saved=0,
    )


def _check_base(session: Session, here: Context, base: str) -> None:
    found = session.get(BaseModel, base)
    if found is None or found.cloud not in here.settings.clouds:
        names = session.scalars(select(BaseModel.name).order_by(BaseModel.name)).all()
        raise RefusalError(f"no cloud serves {base!r}; there is: {', '.join(names) or 'none, see daemon.toml'}")


def _check_room(session: Session, new: TinkerModel) -> None:
    alive = session.scalar(
        select(func.count())
        .select_from(TinkerModel)
        .join(TinkerSession, TinkerSession.id == TinkerModel.session)
        .where(
            TinkerModel.owner == new.owner,
            TinkerModel.id != new.id,
            TinkerSession.ended.is_(False),
            TinkerSession.seen_at > time.time() - _ALIVE,
        )
    )
    if (alive or 0) >= MOST_MODELS:
        raise RefusalError(f"{alive} models are in training, and {MOST_MODELS} may be: close a ServiceClient first")


def _check_optimizer(config: dict[str, Any] | None) -> None:
    if config is not None and config.get("type") != _ADAM:
        raise RefusalError(
            f"optimizer {brief(config.get('type'))} is not offered: leave optimizer_config out, for Adam"
        )


def _saving(name: str, ttl: int | None, labels: dict[str, Any] | None, *, overwrite: bool) -> dict[str, Any]:
    return {"name": checked_name(name), "ttl": ttl, "labels": labels or {}, "overwrite": overwrite, "sampler": None}
