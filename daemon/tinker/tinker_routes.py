"""Tinker's API under `/api/v1`, and the hub of tokenizers under `/hub`."""

from __future__ import annotations

from fastapi import APIRouter

from isthmus.daemon.tinker.listing_routes import add_refusals, listing
from isthmus.daemon.tinker.session_routes import sessions
from isthmus.daemon.tinker.tinker_service import tinker_lifespan
from isthmus.daemon.tinker.tokenizer_hub import hub
from isthmus.daemon.tinker.training_routes import training


def router() -> APIRouter:
    """All of it. Its lifespan runs what answers."""
    api = APIRouter(lifespan=tinker_lifespan)
    rest = APIRouter()
    add_refusals(rest)
    for part in (sessions, training, listing, rest):
        api.include_router(part, prefix="/api/v1")
    api.include_router(hub)
    return api
