"""Tinker's API under `/api/v1`, and the hub of tokenizers under `/hub`."""

from __future__ import annotations

from fastapi import APIRouter

from isthmus.daemon.tinker.endpoints.listing_routes import add_refusals, listing
from isthmus.daemon.tinker.endpoints.session_routes import sessions
from isthmus.daemon.tinker.endpoints.tokenizer_hub import hub
from isthmus.daemon.tinker.endpoints.training_routes import training
from isthmus.daemon.tinker.tinker_service import tinker_lifespan


def router() -> APIRouter:
    """All of it. Its lifespan runs what answers."""
    api = APIRouter(lifespan=tinker_lifespan)
    rest = APIRouter()
    add_refusals(rest)
    for part in (sessions, training, listing, rest):
        api.include_router(part, prefix="/api/v1")
    api.include_router(hub)
    return api
