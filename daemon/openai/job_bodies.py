"""What a request for a fine-tuning job may ask (`isthmus.daemon.openai.request_fields` has the rule).

followed    model (a base model, or an adapter of one's own to go on from), training_file, validation_file, suffix
            (letters, digits, `.`, `-`, `_`), seed, metadata (its `mode` is "split" or "emulator"; with the
            latter, its `package` names one that the cloud offers, its `public_file` is a file's id, and its
            `leave_out_shared` is "true" or "false"),
            method.supervised.hyperparameters {batch_size, n_epochs, learning_rate_multiplier} or the older
            hyperparameters, each a number or "auto"
satisfied   integrations (none)
refused     the methods dpo and reinforcement
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from isthmus.daemon.jobs.kinds import MODES
from isthmus.daemon.openai.request_fields import Fields, only
from isthmus.daemon.web.api_error import ApiError

MODE, PACKAGE, PUBLIC, LEAVE_OUT = "mode", "package", "public_file", "leave_out_shared"
"""The keys of `metadata` that decide something; the last three where the mode is "emulator"."""
_NOT_YET = "only supervised tuning is done here"


def _whole(highest: int) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value == "auto" or (type(value) is int and 1 <= value <= highest):
            return value
        raise ValueError(f"give a whole number from 1 to {highest}, or 'auto'")

    return BeforeValidator(check)


def _rate(value: Any) -> Any:
    if value == "auto" or (type(value) in (int, float) and 1e-6 <= value <= 1e4):
        return value
    raise ValueError("give a number from 0.000001 to 10000, or 'auto'")


def _labels(value: Any) -> Any:
    if not isinstance(value, dict) or len(value) > 16:
        raise ValueError("give an object of at most 16 pairs")
    if not all(len(key) <= 64 and isinstance(text, str) and len(text) <= 512 for key, text in value.items()):
        raise ValueError("keys have at most 64 characters, and values are texts of at most 512")
    if value.get(MODE, "split") not in MODES:
        raise ValueError(f"{MODE} says where the middle layers are: give {' or '.join(MODES)}, or leave it out")
    if value.get(MODE) == "emulator" and value.get(LEAVE_OUT, "false") not in ("true", "false"):
        raise ValueError(f'{LEAVE_OUT} is "true" or "false"')
    return value


class Hyperparameters(Fields):
    """Each a number, or "auto"."""

    batch_size: Annotated[Any, _whole(256)] = "auto"
    learning_rate_multiplier: Annotated[Any, BeforeValidator(_rate)] = "auto"
    n_epochs: Annotated[Any, _whole(50)] = "auto"


class Supervised(Fields):
    """The one method that there is."""

    hyperparameters: Hyperparameters = Hyperparameters()


class Method(Fields):
    """How to tune."""

    type: Annotated[Literal["supervised"], only("supervised", why=_NOT_YET)]
    supervised: Supervised = Supervised()
    dpo: Annotated[Any, only(why=_NOT_YET)] = None
    reinforcement: Annotated[Any, only(why=_NOT_YET)] = None


class JobBody(Fields):
    """The body of `POST /v1/fine_tuning/jobs`."""

    model: Annotated[str, Field(min_length=1)]
    training_file: str
    validation_file: str | None = None
    suffix: Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")] | None = None
    seed: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    metadata: Annotated[dict[str, str], BeforeValidator(_labels)] | None = None
    method: Method = Method(type="supervised")
    hyperparameters: Hyperparameters = Hyperparameters()
    integrations: Annotated[Any, only([], None, why="nothing is sent to other services")] = None

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        if {"method", "hyperparameters"} <= self.model_fields_set:
            raise ApiError(
                400, "hyperparameters are in method, and beside it: give those in method alone", param="hyperparameters"
            )
        return self

    @property
    def kind(self) -> str:
        """The kind of the job that does it."""
        return MODES[(self.metadata or {}).get(MODE, "split")]

    @property
    def private(self) -> Mapping[str, str]:
        """Those of PACKAGE, PUBLIC and LEAVE_OUT that a job in the emulator's mode gives."""
        labels = (self.metadata or {}) if self.kind == "tune" else {}
        return {name: labels[name] for name in (PACKAGE, PUBLIC, LEAVE_OUT) if name in labels}

    @property
    def numbers(self) -> Mapping[str, Any]:
        """The hyperparameters."""
        by_method = "method" in self.model_fields_set
        return (self.method.supervised.hyperparameters if by_method else self.hyperparameters).model_dump()
