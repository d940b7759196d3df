"""How a body of JSON is read: one object, and nothing in it that could not be stored, or told again."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from isthmus.common.bounded_values import check_json
from isthmus.daemon.web.api_error import ApiError


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        ApiError: It is none, has too many values, says something twice, or has half of a surrogate pair or a number
            beyond all floats.
    """
    check_values(body)
    try:
        values = json.loads(
            body.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite
        )
        if b"\\ud" in body.lower():  # perhaps half of a surrogate pair, which no answer could repeat
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({error}): send one JSON object", code="invalid_json") from error
    if not isinstance(values, dict):
        raise ApiError(400, "the body is JSON, but no object: send one JSON object", code="invalid_json")
    return values


def check_values(body: bytes) -> None:
    """Refuse a body of JSON that has more values than may be, before it is parsed. Raises ApiError."""
    try:
        check_json(body)
    except ValueError as error:
        raise ApiError(400, f"the body {error}: send less at a time", code="too_many_values") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is beyond 1.8e308")
    return value
