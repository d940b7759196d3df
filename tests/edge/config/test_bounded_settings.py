"""Every number of a setting has an upper bound, whoever gives it."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import BaseModel, Field

from isthmus.common.errors import ConfigError
from isthmus.common.machine import usable_cores
from isthmus.daemon.tinker.tinker_requests import AdamParams
from isthmus.edge.config.audit_config import AuditCommandConfig
from isthmus.edge.config.client_config import EvalConfig, GenerateConfig
from isthmus.edge.config.settings import MOST_WIDTH
from isthmus.edge.config.training_config import TrainConfig, TuneConfig, load_config

CLASSES = [TrainConfig, TuneConfig, EvalConfig, GenerateConfig, AuditCommandConfig, AdamParams]


def unbounded(cls: type[BaseModel]) -> list[str]:
    """The numbers of a class that may be as large as one likes."""
    found = []
    for name, field in cls.model_fields.items():
        kinds = {field.annotation, *get_args(field.annotation)}
        marks = {mark for each in field.metadata for mark in ("le", "lt") if hasattr(each, mark)}
        checks = cls.__pydantic_decorators__.field_validators.values()
        if kinds & {int, float} and not marks and not any(name in check.info.fields for check in checks):
            found.append(name)
    return found


@pytest.mark.parametrize("cls", CLASSES)
def test_every_number_has_an_upper_bound(cls: type[BaseModel]) -> None:
    assert unbounded(cls) == []


def test_a_number_without_one_is_noticed() -> None:
    class Some(BaseModel):
        a: int = 1
        b: float | None = Field(None, ge=0)
        c: int | None = Field(None, lt=3)

    assert unbounded(Some) == ["a", "b"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"threads": 100_000}, f"give {usable_cores()} at most"),
        ({"rank": 100_000}, f"less than or equal to {MOST_WIDTH}"),
        ({"batch": 10**9}, "less than or equal to"),
        ({"max_length": 10**9}, "less than or equal to"),
        ({"virtual_tokens": 10**9}, "less than or equal to"),
        ({"steps": 10**12}, "less than or equal to"),
    ],
)
def test_a_number_beyond_its_bound_is_refused_by_name(values: dict[str, Any], says: str) -> None:
    required = {"cloud": "isthmus://a:1#SHA256:x", "data": "a.jsonl"}
    with pytest.raises(ConfigError, match=says) as refused:
        load_config(None, {**required, **values})
    assert str(refused.value).startswith(f"{next(iter(values))} = ")
    load_config(None, {**required, **dict.fromkeys(values, 2)})
