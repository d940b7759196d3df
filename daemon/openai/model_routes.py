"""`/v1/models`: what can be talked to. Names contain `/` and `:`.

A base model is listed while its cloud is known, whether it can be reached or not, and cannot be deleted here (403). An
adapter is its owner's; what a job that has not ended goes on from cannot be deleted (400).
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from sqlalchemy import select

from isthmus.common.files import remove_folder
from isthmus.daemon.openai.job_objects import jobs_under_way
from isthmus.daemon.openai.model_names import adapter_named, form_of, unknown_model
from isthmus.daemon.openai.request_fields import NoQuery
from isthmus.daemon.serving.answers import Target
from isthmus.daemon.state.tables import BaseModel, Model, Owner
from isthmus.daemon.web.api_error import ApiError
from isthmus.daemon.web.context import Asker, Here

routes = APIRouter()


@routes.get("/models")
def list_models(here: Here, asker: Asker, _: NoQuery) -> Any:
    """Base models by name, then the owner's adapters, the newest first."""
    with here.database.reading() as session:
        bases = session.scalars(select(BaseModel).order_by(BaseModel.name)).all()
        own = select(Model).where(Model.owner == asker.id, Model.deleted.is_(False)).order_by(Model.created_at.desc())
        adapters = session.scalars(own).all()
    return {"object": "list", "data": [*map(_base, bases), *(_adapter(model, asker) for model in adapters)]}


@routes.get("/models/{name:path}")
def retrieve_model(here: Here, asker: Asker, name: str, _: NoQuery) -> Any:
    """One model; `isthmus.form` is that of the examples that it was tuned on, where it is known."""
    with here.database.reading() as session:
        adapter = adapter_named(session, asker.id, name)
        base = session.get(BaseModel, name)
    if adapter is not None:
        form = form_of(Target(adapter.base, str(here.home.path / adapter.folder)))
        return {**_adapter(adapter, asker), **({} if form is None else {"isthmus": {"form": form}})}
    if base is None:
        raise unknown_model(name)
    return _base(base)


@routes.delete("/models/{name:path}")
def delete_model(here: Here, asker: Asker, name: str, _: NoQuery) -> Any:
    """Remove an adapter from the disk; its name is not used again."""
    with here.database.session() as session:
        adapter = adapter_named(session, asker.id, name)
        if adapter is None:
            if session.get(BaseModel, name) is not None:
                raise ApiError(403, f"{name!r} is a base model, which its cloud serves: it cannot be deleted here")
            raise unknown_model(name)
        folder = here.home.path / adapter.folder
        for job in jobs_under_way(session):
            if job.spec.get("start_from") in (name, adapter.id):
                raise ApiError(
                    400, f"the job {job.id} goes on from {name!r}: cancel it, or wait for its end", code="model_in_use"
                )
        adapter.deleted = True
    if folder.exists():
        remove_folder(folder)
    return {"id": name, "object": "model", "deleted": True}


def _base(model: BaseModel) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": int(model.seen_at), "owned_by": model.cloud}


def _adapter(model: Model, owner: Owner) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": int(model.created_at), "owned_by": owner.name}
