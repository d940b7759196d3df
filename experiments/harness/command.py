"""Makes a command of a measurement: its flags are the fields of its settings. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from isthmus.common.errors import ConfigError
from isthmus.common.readable import lines
from isthmus.common.shutdown import interruptible

EXPERIMENTS = "isthmus.experiments"
RIGS = f"{EXPERIMENTS}.rigs"

_KEEP = Annotated[Path | None, typer.Option(help="Folder for the run's files; by default they are gone afterwards.")]
_JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_NO_DEFAULT = inspect.Parameter.empty


@dataclass(frozen=True, slots=True)
class Measurement:
    """A measurement that a command makes.

    Attributes:
        settings: A dataclass. Each field that is annotated with a `typer.Option` is a flag, and its docstring is the
            help of the command.
        run: Where the function is that measures, `module:function` below `isthmus.experiments`. It takes the settings,
            and a folder for the run's files unless `folder` is `none`, and returns what JSON can say.
        show: Where the function is that prints the result for people; None for a line for each value.
        folder: Whether the run has no folder, one that is gone afterwards, or one that `--keep` can name.
        passed: Keys of the result; the command ends with 1 unless all are true.
    """

    settings: type[Any]
    run: str
    show: str | None = None
    folder: Literal["none", "temporary", "keep"] = "keep"
    passed: tuple[str, ...] = ()

    def command(self) -> Callable[..., None]:
        """The function that typer makes a command of."""

        def call(*, as_json: bool, **flags: Any) -> None:
            keep = flags.pop("keep") if self.folder == "keep" else None  # a setting of that name is something else
            run, settings = load(self.run), self.settings(**flags)
            with interruptible():
                if self.folder == "none":
                    result = run(settings)
                else:
                    from isthmus.experiments.harness.launch import working_folder

                    with working_folder(keep) as folder:
                        result = run(settings, folder)
            if as_json:
                typer.echo(json.dumps(result))
            elif self.show is not None:
                load(self.show)(result)
            else:
                for line in lines(result, 32):
                    typer.echo(line)
            if not all(result[name] for name in self.passed):
                raise typer.Exit(1)

        own = {"keep": (_KEEP, None)} if self.folder == "keep" else {}
        parameters = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in {**flags_of(self.settings), **own, "as_json": (_JSON, False)}.items()
        ]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
        call.__doc__ = self.settings.__doc__
        return call


def flags_of(settings: type[Any]) -> dict[str, tuple[Any, Any]]:
    """The annotation and the default of each field that is a flag."""
    hints = typing.get_type_hints(settings, include_extras=True)
    return {
        field.name: (hints[field.name], _NO_DEFAULT if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(settings)
        if any(isinstance(extra, typer.models.OptionInfo) for extra in getattr(hints[field.name], "__metadata__", ()))
    }


def load(place: str) -> Callable[..., Any]:
    """The function at `module:function` below `isthmus.experiments`.

    Raises ConfigError where it is one of the rigs, which the installed package leaves out.
    """
    module, name = place.split(":")
    try:
        return typing.cast(Callable[..., Any], getattr(import_module(f"{EXPERIMENTS}.{module}"), name))
    except ModuleNotFoundError as error:
        if error.name != RIGS:
            raise
        raise ConfigError(
            f"this command needs {RIGS}, which the installed package leaves out: run it in the source tree, after "
            "`make setup`"
        ) from None
