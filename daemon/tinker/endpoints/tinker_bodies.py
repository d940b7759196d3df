"""Reading requests of Tinker's API, and answering them with promises."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError

from isthmus.daemon.state.tables import TinkerPromise
from isthmus.daemon.web.api_error import ApiError
from isthmus.daemon.web.json_object import check_values

SMALL_BODY = 256 << 10
"""Bytes of a body at most where it holds neither data nor a prompt."""

MOST_LISTED = 1000

T = TypeVar("T", bound=BaseModel)


async def read_body(request: Request, most: int = SMALL_BODY) -> bytes:
    """A request's body. Raises ApiError where it has more than `most` bytes."""
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > most:
            raise ApiError(413, f"the body has more than {most} bytes: send less at a time", code="body_too_large")
    return bytes(found)


async def read_json(request: Request, kind: type[T], most: int = SMALL_BODY) -> T:
    """A request's JSON. Raises ApiError where it is no `kind`."""
    return parsed(await read_body(request, most), kind)


def parsed(body: bytes, kind: type[T]) -> T:
    """The JSON of a body. Raises ApiError where it is no `kind`, or has too many values."""
    check_values(body)
    try:
        return kind.model_validate_json(body or b"{}")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        raise ApiError(400, f"{where}: {first['msg']}", param=where, code="invalid_body") from error


def checked_page(limit: int, offset: int) -> tuple[int, int]:
    """What part of a list is asked for. Raises ApiError where that is none."""
    if limit < 1 or not 0 <= offset < 2**62:
        raise ApiError(400, f"limit = {limit}, offset = {offset}: from 1, and from 0 on", param="limit")
    return min(limit, MOST_LISTED), offset


def not_found(what: str, value: str) -> ApiError:
    """The error for something that is not there, or is another owner's."""
    return ApiError(404, f"there is no {what} {value}", code="not_found")


def promised(promise: TinkerPromise, **more: Any) -> JSONResponse:
    """What a client is told of a promise."""
    told: dict[str, Any] = {"request_id": promise.id, **more}
    if promise.model is not None:
        told["model_id"] = promise.model
    return JSONResponse(told)
