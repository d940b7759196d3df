"""Reading daemon.toml, and writing one with every setting in it, as its owner would begin."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from isthmus.common.errors import ConfigError
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.edge.config.client_config import DEFAULT_KEY, SCHEMES, ClientConfig
from isthmus.edge.config.config_text import check_name, read_toml

_DRAFTS = ("none", "ngram")  # anything else is a folder
_WIDTH = 100


def read_daemon_settings(path: Path | None, changes: Mapping[str, Any] | None = None) -> DaemonSettings:
    """The settings of a file. Relative paths in it are of its folder, and `~` is the user's home.

    Args:
        path: The file; None for settings by default.
        changes: What wins over the file, such as flags; those that are None are left out.

    Raises:
        ConfigError: The file cannot be read, a key is unknown, or a value does not make sense. The message is one line.
    """
    values: dict[str, Any] = {} if path is None else read_toml(path)
    _check_names(values, path)
    if path is not None:
        values = _with_paths(values, path.absolute().parent)
    values |= {name: value for name, value in (changes or {}).items() if value is not None}
    try:
        return DaemonSettings.model_validate(values)
    except ValidationError as error:
        place = "" if path is None else f"{path}: "
        raise ConfigError(place + _one_line(error)) from error


def example(cloud: str | None = None) -> str:
    """A daemon.toml with every setting, its default and what it means. What is by default is commented out.

    Args:
        cloud: How to reach a cloud, which the file then has; a path in it is absolute.
    """
    lines = [
        "# The edge's daemon. Behind a # stand the defaults, and of paths examples: take the # away to change one.",
        "# Relative paths are of this file's folder.",
    ]
    for name, field in DaemonSettings.model_fields.items():
        if name != "clouds":
            lines += ["", *_commented(field.description), _setting(name, field.get_default(call_default_factory=True))]
    lines += ["", *_commented(DaemonSettings.model_fields["clouds"].description)]
    lines += ["#[clouds.main]" if cloud is None else "[clouds.main]"]
    for name, field in ClientConfig.model_fields.items():
        default = "cloud.txt" if field.is_required() else field.default
        is_given = name == "cloud" and cloud is not None
        setting = f"cloud = {json.dumps(cloud)}" if is_given else _setting(name, default)
        lines += ["", *_commented(field.description), setting]
    return "\n".join(lines) + "\n"


def _check_names(values: Mapping[str, Any], path: Path | None) -> None:
    for name in values:
        check_name(name, path, list(DaemonSettings.model_fields))
    for cloud, table in _tables(values):
        known = [f"clouds.{cloud}.{name}" for name in ClientConfig.model_fields]
        for name in table:
            check_name(f"clouds.{cloud}.{name}", path, known)


def _with_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The values, with paths that do not depend on where the daemon is started."""

    def located(value: Any) -> Any:
        return str(folder / Path(value).expanduser()) if isinstance(value, str) else value

    def of_cloud(name: str, value: Any) -> Any:
        is_path = name in {"key", "tls_ca", "tls_cert", "tls_key"} or (
            name == "cloud" and isinstance(value, str) and not value.startswith(SCHEMES)
        )
        return located(value) if is_path else value

    for name in ("tls_cert", "tls_key"):
        if name in values:
            values[name] = located(values[name])
    if values.get("offered_draft", "none") not in _DRAFTS:
        values["offered_draft"] = located(values["offered_draft"])
    for _, table in _tables(values):
        for name in list(table):
            table[name] = of_cloud(name, table[name])
    return values


def _tables(values: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The clouds' tables; what is none is left to the model to complain about."""
    clouds = values.get("clouds")
    if isinstance(clouds, dict):
        yield from ((name, table) for name, table in clouds.items() if isinstance(table, dict))


def _one_line(error: ValidationError) -> str:
    """The first complaint as one sentence with the key, its value and what it is for."""
    first = error.errors(include_url=False)[0]
    reason = first["msg"].removeprefix("Value error, ")
    loc = first["loc"]
    if not loc:
        return f"{reason}."
    name = ".".join(map(str, loc))
    meaning = _meaning(loc)
    if first["type"] == "missing":
        return f"{name} is missing. {meaning}"
    value = first["input"]
    said = name if isinstance(value, dict | list) else f"{name} = {value!r:.100}"
    return f"{said}: {reason[:1].lower()}{reason[1:]}. {meaning}"


def _meaning(loc: tuple[int | str, ...]) -> str:
    is_of_cloud = loc[0] == "clouds" and len(loc) > 2
    cls: type[BaseModel] = ClientConfig if is_of_cloud else DaemonSettings
    field = cls.model_fields.get(str(loc[2] if is_of_cloud else loc[0]))
    return "" if field is None else field.description or ""


def _commented(text: str | None) -> list[str]:
    return textwrap.wrap(text or "", _WIDTH, initial_indent="# ", subsequent_indent="# ")


def _setting(name: str, value: Any) -> str:
    """A line of TOML. It has no word for None, which is the default of paths alone."""
    if value is None:
        value = str(DEFAULT_KEY) if name == "key" else f"{name}.pem"
    return f"#{name} = {json.dumps(value)}"
