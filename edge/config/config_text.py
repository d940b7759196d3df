"""What the settings of a run are read from, and the one sentence that a mistake in them gets."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from isthmus.common.bounded_values import brief
from isthmus.common.errors import ConfigError
from isthmus.common.readable import did_you_mean

_LAYERS = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?", re.ASCII)  # one number, or the two ends of a range


def read_toml(path: Path) -> dict[str, Any]:
    """The settings of a TOML file.

    Raises:
        ConfigError: It cannot be read, or is not TOML in UTF-8.
    """
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"the configuration file {path} cannot be read ({_why(error)}): check the path.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the configuration file {path} is not UTF-8 (byte {error.start}): save it as UTF-8."
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the configuration file {path} is not TOML: {error}. Write `name = value` lines.") from error


def read_text(name: str, path: str, what: str, remedy: str) -> str:
    """The contents of the file that the setting `name` leads to, without white space around them.

    Raises:
        ConfigError: It is not a readable text file; the message says that the value is not `what` either.
    """
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{name} = {path!r} is neither {what} nor a readable file ({_why(error)}): {remedy}"
        ) from error


def read_layers(value: object) -> tuple[int, ...]:
    """Numbers of layers, ascending and each once, from `4,7,10-12` (the ends of a range are in it) or a list of such.

    Raises:
        ValueError: It is something else.
    """
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not parts:
        raise ValueError("needs numbers and ranges of layers, such as 4,7,10-12")
    return tuple(sorted({layer for part in parts for layer in _range(str(part).strip())}))


def _range(text: str) -> range:
    match = _LAYERS.fullmatch(text)
    first, last = (0, -1) if match is None else (int(match[1]), int(match[2] or match[1]))
    if first > last:
        raise ValueError(f"{text!r} is neither a layer's number nor a range of them, such as 10-12")
    return range(first, last + 1)


def check_name(name: str, path: Path | None, known: Sequence[str]) -> None:
    """Refuse a setting whose name is not `known`.

    Args:
        path: The file that it stands in; None for a flag.

    Raises:
        ConfigError: It is unknown; the message offers the nearest name.
    """
    if name in known:
        return
    remedy = did_you_mean(name.replace("-", "_"), known) or f"the names are {', '.join(known)}."
    place = f" in {path}" if path is not None else ""
    raise ConfigError(f"unknown setting {brief(name)}{place}: {remedy}")


def one_line(error: ValidationError, cls: type[BaseModel]) -> str:
    """The first of pydantic's complaints as one sentence with the field, its value and what it is for."""
    first = error.errors(include_url=False)[0]
    reason = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return f"{reason}."
    name = str(first["loc"][0])
    meaning = cls.model_fields[name].description
    if first["type"] == "missing":
        return f"{name!r} is missing: give --{name.replace('_', '-')} or set it in the file. {meaning}"
    return f"{name} = {brief(first['input'])}: {reason[:1].lower()}{reason[1:]}. {meaning}"


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
