"""The checkpoint of an unfinished row: its run and the results so far, so that an interrupted row resumes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from isthmus.common.errors import CheckpointError
from isthmus.common.files import disk_errors, new_folder
from isthmus.common.ownership import private_folder
from isthmus.experiments.harness.finished_cells import Cells
from isthmus.experiments.harness.launch import working_folder

_RESULTS, _RUN = "results.jsonl", "run"
_T = TypeVar("_T")


class RowCheckpoint:
    """An unfinished row in a folder that its user alone can enter: a recording has private texts.

    Args:
        folder: Made where it is missing. What removes it is `leak.leak`, once the row is finished.
        texts: A fingerprint of the row's texts; with others nothing of the folder is used.

    Raises:
        CheckpointError: The file of results is damaged.
        DiskError: The folder cannot be made or read.
        OwnershipError: It is another user's, or others may write to it.
    """

    def __init__(self, folder: Path, texts: str) -> None:
        with disk_errors(folder):
            self._folder = private_folder(folder)
        self._settings = {"texts": texts}
        self._cells = Cells(folder / _RESULTS, Console(quiet=True))

    @property
    def seconds(self) -> float:
        """What the run and the results took that were asked for."""
        return self._cells.seconds

    def run(self, make: Callable[[Path], Iterable[Path]]) -> Path:
        """The folder with what is kept of the run, which is made where it is not there.

        Args:
            make: Makes the run with an empty folder for its files, and returns those that are kept.
        """
        kept = self._folder / _RUN

        def made() -> dict[str, Any]:
            with working_folder() as folder, new_folder(kept, 0o700) as new:
                for path in make(folder):
                    shutil.move(path, new / path.name)
            return {}

        self._cells.get(_RUN, self._settings, made)
        return kept

    def result(self, name: str, settings: Mapping[str, Any], kind: type[_T], make: Callable[[], _T]) -> _T:
        """A result of the row; see `stored`."""
        return stored(self._cells, name, {**self._settings, **settings}, kind, make)


def stored(cells: Cells, name: str, settings: Mapping[str, Any], kind: type[_T], make: Callable[[], _T]) -> _T:
    """A result for these settings: as the file of cells has it, or made now and stored.

    Args:
        kind: Its type, which pydantic converts to a JSON object and back.

    Raises:
        CheckpointError: What is stored is not of this type.
        DiskError: It cannot be stored.
    """
    form = TypeAdapter(kind)
    found = cells.get(name, settings, lambda: form.dump_python(make(), mode="json"))
    try:
        return form.validate_python(found)
    except ValidationError as error:
        raise CheckpointError(
            f"{cells.path} has no usable {name!r}: remove this file, and it is measured again"
        ) from error
