"""OpenAI's API, for `isthmus.daemon.daemon_server`."""

from __future__ import annotations

from fastapi import APIRouter, Request

from isthmus.common.bounded_values import shown
from isthmus.daemon.openai import file_routes, job_routes, model_routes
from isthmus.daemon.openai.completions import chat_routes, completion_routes
from isthmus.daemon.web.api_error import ApiError

ABSENT = ("responses", "embeddings", "batches", "assistants")
"""Paths of the API that clients ask for, and that are not here."""

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def router() -> APIRouter:
    """The paths under `/v1`."""
    api = APIRouter(prefix="/v1")
    for part in (file_routes, job_routes, model_routes, chat_routes, completion_routes):
        api.include_router(part.routes)
    for name in ABSENT:
        for path in (f"/{name}", f"/{name}/{{rest:path}}"):
            api.add_api_route(path, _absent, methods=_METHODS)
    return api


async def _absent(request: Request) -> None:
    raise ApiError(
        404,
        f"{shown(request.url.path)} is not offered here: there are /v1/chat/completions, /v1/completions, /v1/files, "
        "/v1/fine_tuning/jobs and /v1/models",
        code="not_found",
    )
