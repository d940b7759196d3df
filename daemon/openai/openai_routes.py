"""OpenAI's API, for `isthmus.daemon.daemon_server`."""

from __future__ import annotations

from fastapi import APIRouter

from isthmus.daemon.openai import file_routes, job_routes, model_routes
from isthmus.daemon.openai.completions import chat_routes, completion_routes


def router() -> APIRouter:
    """The paths under `/v1`."""
    api = APIRouter(prefix="/v1")
    for part in (file_routes, job_routes, model_routes, chat_routes, completion_routes):
        api.include_router(part.routes)
    return api
