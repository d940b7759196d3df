"""What the edge's commands share: flags for the fields of a configuration, help under headings, how a run ends."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from pydantic import ValidationError

from isthmus.common.errors import ConfigError, DataError
from isthmus.common.shutdown import interruptible
from isthmus.edge.config.client_config import NO_DATA
from isthmus.edge.config.settings import PANELS, Settings, field_names, panel_of
from isthmus.edge.config.training_config import Config, load_config

if TYPE_CHECKING:
    from isthmus.edge.run_report import Report


Command = Callable[..., None]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="A TOML file with the same names; flags win over it.")
]
SharedConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="A TOML file with the same names; flags win over it. `edge train`, `edge eval` and `edge generate` can "
        "share one: each ignores the keys of the others.",
    ),
]


class GroupedCommand(typer.core.TyperCommand):
    """A command whose `--help` lists the options under headings: those of `rich_help_panel`, as plain text."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, those without a heading first."""
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Arguments", "Options", *PANELS)}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                usual = "Arguments" if param.param_type_name == "argument" else "Options"
                groups[getattr(param, "rich_help_panel", None) or usual].append(record)
        for heading, records in groups.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def with_flags(cls: type[Settings], *, without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Give a command that takes `**flags` the flags of a configuration: one for every field, with its description.

    Args:
        without: Fields that the command does not use, and which get no flag.
    """

    def decorate(function: Command) -> Command:
        hints = typing.get_type_hints(function, include_extras=True)
        named = [
            p for p in inspect.signature(function).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        own = [p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in named]
        function.__signature__ = inspect.Signature([*own, *_flags(cls, without)])  # type: ignore[attr-defined]  # typer reads it
        return function

    return decorate


def read_settings(cls: type[Config], file: Path | None, flags: dict[str, Any]) -> Config:
    """The settings of a command, from its file and its flags.

    Raises:
        BadParameter: A required one is in neither: a usage error, as for any option that is missing.
        ConfigError: See `load_config`.
        DataError: A file of texts is not there.
    """
    try:
        settings = load_config(file, flags, cls)
    except ConfigError as error:
        reason = error.__cause__
        if isinstance(reason, ValidationError) and reason.errors()[0]["type"] == "missing":
            _check_texts(flags)
            raise typer.BadParameter(str(error)) from error
        raise
    _check_texts(dict(settings))
    return settings


def run_to_its_end(run: Callable[[], Report], out: Path, *, as_json: bool) -> None:
    """Make a training run into `out` and print its report; Ctrl-C ends it with what the run says about going on."""
    with interruptible():
        report = run()
    typer.echo(report.to_json() if as_json else report.lines(out))


def _check_texts(values: Mapping[str, Any]) -> None:
    """Look whether the files of texts are there, before a cloud is asked for anything. Raises DataError."""
    for name in ("data", "validation", "public"):
        value = values.get(name)
        if value in (None, NO_DATA) or value.startswith("hub:") or values.get("format") == "hub":
            continue
        if not Path(value).exists():
            raise DataError(f"{name} = {value!r} is no file here: check the path")


def _flags(cls: type[Settings], without: Collection[str]) -> list[inspect.Parameter]:
    flags = []
    for name in field_names(cls):
        if name in without:
            continue
        field = cls.model_fields[name]
        default = "" if field.is_required() or field.default in (None, ()) else f" [default: {field.default}]"
        option = typer.Option(
            f"--{name.replace('_', '-')}" + (f"/--no-{name.replace('_', '-')}" if field.annotation is bool else ""),
            help=f"{field.description}{default}",
            show_default=False,
            rich_help_panel=panel_of(cls, name),
        )
        # An option that may be given several times.
        several = field.annotation == tuple[str, ...]
        flags.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[(list[str] if several else _plain(field.annotation)) | None, option],
            )
        )
    return flags


def _plain(annotation: Any) -> Any:
    """The type that the command line parses for a field; choices and ranges are checked by the configuration itself."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation if annotation in (int, float, bool, Path) else str
