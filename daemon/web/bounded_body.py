"""What a body that is wrong may cost: pydantic keeps every error of it, with what it was, before the first is told.

How many values a body of JSON may hold is checked before (`isthmus.common.bounded_values`). Here lists end at their
first error (`FailFast`), an object has no unknown names before its values are looked at, and what holds few entries is
counted first (`few`).
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from isthmus.common.bounded_values import shown

UNKNOWN = "unknown_field"
"""The error of a name that is not one of a model's; its `ctx` has it as `name`."""


class BoundedBody(BaseModel):
    """An object of a body. One that has unknown names is refused, with one error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        if isinstance(values, dict):
            unknown = next((name for name in values if name not in cls.model_fields), None)
            if unknown is not None:
                raise PydanticCustomError(UNKNOWN, "unknown field {shown}: leave it out", {"name": unknown,
                                          "shown": shown(unknown)})  # fmt: skip
        return values


def few(most: int) -> BeforeValidator:
    """Refuse an object or a list of more than `most` entries, before any is looked at."""

    def check(values: Any) -> Any:
        if isinstance(values, (dict, list)) and len(values) > most:
            raise ValueError(f"it has {len(values)} entries: {most} at most")
        return values

    return BeforeValidator(check)
