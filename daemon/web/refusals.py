"""What a client is told where a request fails: every error in OpenAI's form, with a status that its SDK understands.

The SDKs repeat a request on 408, 409, 429 and 5xx: those are for what may be otherwise a moment later.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from isthmus.common.bounded_values import brief
from isthmus.common.errors import IsthmusError
from isthmus.daemon.disk_room import NoRoomError
from isthmus.daemon.jobs.job_service import UnknownJobError, WrongStateError
from isthmus.daemon.serving.answers import BusyError
from isthmus.daemon.state.owners import FIRST
from isthmus.daemon.web.api_error import ApiError
from isthmus.daemon.web.bounded_body import UNKNOWN
from isthmus.daemon.workers.asking import WorkerError

_STATUSES = {
    **dict.fromkeys((10, 11, 21, 22, 23, 24, 25, 26, 27, 28, 29), 400),
    20: 404,
    **dict.fromkeys((30, 31, 32, 33, 34, 35, 36, 70, 71, 75), 502),  # what is wrong between this machine and a cloud
    **dict.fromkeys((40, 41, 42, 43, 62), 503),
    **dict.fromkeys((50, 72), 400),
    51: 507,
}
"""Of an exit code (docs/exit-codes.md); 500 for others."""


def status_of(error: IsthmusError) -> int:
    """HTTP's status of an error."""
    return _STATUSES.get(error.code if isinstance(error, WorkerError) else error.exit_code, 500)


def as_api_error(error: Exception) -> ApiError | None:
    """What a client is told of an error; None for one that is a defect of the daemon."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            headers = dict(error.headers or {})
            return ApiError(error.status_code, _http_message(error), code=_code(error.status_code), headers=headers)
        case UnknownJobError():
            return ApiError(404, str(error), code="not_found")
        case WrongStateError():
            return ApiError(400, str(error), code="wrong_state")
        case BusyError():
            return ApiError(429, str(error) or "too many requests wait: ask again in a moment", code="busy",
                            headers={"retry-after": "1"})  # fmt: skip
        case WorkerError(code=1):
            return None
        case IsthmusError() if (status := status_of(error)) != 500:
            return ApiError(status, str(error), code=_code(status))
    return None


def respond(error: ApiError, request_id: str | None = None) -> JSONResponse:
    """The answer that says an error."""
    headers = error.headers if request_id is None else {**error.headers, "x-request-id": request_id}
    return JSONResponse(error.body(), error.status, headers)


def internal(request_id: str) -> ApiError:
    """What is said of a defect."""
    return ApiError(500, f"internal error: the daemon's log says more about request {request_id}", code="internal")


def install(app: FastAPI) -> None:
    """Let an application answer its handlers' errors so. What is a defect propagates."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        told = as_api_error(error)
        if told is not None and isinstance(error, NoRoomError) and request.state.owner.name == FIRST:
            told = ApiError(told.status, error.figures, code=told.code)
        if told is None:
            raise error
        return respond(told)

    kinds: tuple[type[Exception], ...] = (
        ApiError,
        RequestValidationError,
        HTTPException,
        UnknownJobError,
        WrongStateError,
        BusyError,
        IsthmusError,
    )
    handler: Callable[[Request, Exception], Awaitable[JSONResponse]] = handle
    for kind in kinds:
        app.add_exception_handler(kind, handler)


def _invalid(error: RequestValidationError) -> ApiError:
    first: dict[str, Any] = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['ctx']['error']} at character {first['loc'][1]}",
                        code="invalid_json")  # fmt: skip
    param = ".".join(where[1:] if where[0] in {"body", "query", "path", "header", "cookie"} else where) or None
    if first["type"] == UNKNOWN:
        return ApiError(400, first["msg"], param=str(first["ctx"]["name"])[:200], code=UNKNOWN)
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "literal_error":
        reason = f"{brief(first['input'])} is none of {first['ctx']['expected']}"
    more = "" if param is None else f"{param}: "
    return ApiError(400, f"{more}{reason}", param=param, code=first["type"])


def _http_message(error: HTTPException) -> str:
    if error.status_code == 404 and error.detail == HTTPStatus.NOT_FOUND.phrase:
        return "there is nothing at this path"
    if error.status_code == 405:
        return f"this path takes {Headers(dict(error.headers or {})).get('allow', 'another method')}"
    return str(error.detail)


def _code(status: int) -> str:
    try:
        return HTTPStatus(status).name.lower()
    except ValueError:
        return "error"
