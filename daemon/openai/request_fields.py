"""How a body or a query of OpenAI's API is read.

The published document names many fields for things that are not done here. Each field of it is one of these:

followed    It does what the document says.
satisfied   It is taken with the values that ask for what happens anyway: the document's default, or words that change
            no answer (`user`, a cache's key). With any other value it is refused.
refused     It is refused with every value but null, where the document lets it be null.

A field that the document does not name is refused, so that a mistake in writing never passes for a setting. Values
have the types of the document: "1" is no number. null stands for a field that is not given, where the document lets it
be null. Every refusal names the field.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from pydantic import BeforeValidator, ConfigDict, ValidationError

from isthmus.common.bounded_values import shown
from isthmus.daemon.web.api_error import ApiError
from isthmus.daemon.web.bounded_body import UNKNOWN, BoundedBody
from isthmus.daemon.web.json_object import parse_object


class Fields(BoundedBody):
    """Some fields that belong together; no others may be there."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


Read = TypeVar("Read", bound=Fields)


def only(*values: Any, why: str) -> BeforeValidator:
    """Satisfy a field with some values, and refuse it with others.

    Args:
        values: Those that ask for what happens anyway.
        why: What the daemon does not do, for the refusal.
    """

    def check(value: Any) -> Any:
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values):
            instead = " or ".join(json.dumps(known) for known in values)
            raise ValueError(f"{why}: leave it out" + (f", or give {instead}" if values else ""))
        return value

    return BeforeValidator(check)


def json_body(cls: type[Read]) -> Callable[[Request], Any]:
    """What gives a handler the fields of its request's JSON body; for `fastapi.Depends`.

    It raises `ApiError` (400) for a body that is none, and 415 where the content type says so.
    """

    async def read(request: Request) -> Read:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise ApiError(415, f"the content type is {shown(media_type)}: send application/json")
        checked(Fields, dict(request.query_params))
        return checked(cls, parse_object(await request.body()))

    return read


def query(cls: type[Read]) -> Callable[[Request], Read]:
    """What gives a handler the fields of its request's query; for `fastapi.Depends`. It raises `ApiError` (400)."""

    def read(request: Request) -> Read:
        values: dict[str, Any] = {}
        for name, value in request.query_params.multi_items():
            if name in values:
                raise ApiError(400, f"{shown(name)} stands twice in the query: give it once", param=name)
            values[name] = value
        return checked(cls, values)

    return read


NoQuery = Annotated[Fields, Depends(query(Fields))]
"""For a handler whose request has no query."""


def checked(cls: type[Read], values: dict[str, Any]) -> Read:
    """The fields of plain values.

    Raises:
        ApiError: One is unknown, missing or wrong; the message names it.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    where = (*first["loc"], first["ctx"]["name"]) if first["type"] == UNKNOWN else first["loc"]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).removeprefix(".")
    param = param.encode("utf-8", "backslashreplace").decode()[:200]  # a name that came with the body may be anything
    if first["type"] == UNKNOWN:
        raise ApiError(400, f"unknown field {shown(param)}: leave it out", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        raise ApiError(400, f"{param!r} is missing: give it", param=param, code="missing_required_parameter")
    reason = first["msg"].removeprefix("Value error, ")
    message = f"{param} = {shown(first['input'])}: {reason[:1].lower()}{reason[1:]}"
    raise ApiError(400, message, param=param or None, code="invalid_value")
