"""The names by which clients know what can be talked to: base models of the clouds, and an owner's own adapters."""

from __future__ import annotations

import json
from pathlib import Path

from sqlalchemy.orm import Session

from isthmus.daemon.home import Home
from isthmus.daemon.serving.answers import Target
from isthmus.daemon.state.tables import BaseModel, Model
from isthmus.daemon.web.api_error import ApiError
from isthmus.daemon.web.context import Context

TUNING = "isthmus_tuning.json"
"""In an adapter's folder (`isthmus.backbone.adapters.adapter_files`, which needs torch)."""


def adapter_named(session: Session, owner: str, name: str) -> Model | None:
    """An owner's adapter of that name that is still there; None where there is none."""
    model = session.get(Model, name)
    return None if model is None or model.owner != owner or model.deleted else model


def find_target(here: Context, owner: str, name: str) -> Target:
    """What answers under a name. Raises ApiError (404) where nothing does."""
    with here.database.reading() as session:
        return target_named(session, here.home, owner, name)


def target_named(session: Session, home: Home, owner: str, name: str) -> Target:
    """The same, for a caller that has a session."""
    model = adapter_named(session, owner, name)
    if model is not None:
        return Target(model.base, str(home.path / model.folder))
    if session.get(BaseModel, name) is not None:
        return Target(name)
    raise unknown_model(name)


def form_of(target: Target) -> str | None:
    """The form of the examples that a target was tuned on ("messages", "prompt" or "text"); None where nobody says it.

    A run writes it beside its adapter (`isthmus.edge.training.trainer`).
    """
    if target.adapter is None:
        return None
    try:
        told = json.loads((Path(target.adapter) / TUNING).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    form = told.get("form") if isinstance(told, dict) else None
    return form if isinstance(form, str) else None


def unknown_model(name: str) -> ApiError:
    """That there is no model of a name."""
    return ApiError(
        404,
        f"there is no model {ascii(name)[:200]}, or it was deleted: GET /v1/models lists what can be talked to",
        param="model",
        code="model_not_found",
    )
