"""What is done of a row that is under way: kept until the row is finished, so that a stopped one goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from isthmus.common.errors import AttackLimitedError, CheckpointError
from isthmus.common.files import claim, disk_errors, write_atomic
from isthmus.experiments.harness.finished_cells import Cells

_SETTINGS, _FILES, _PARTS, _RUN = "settings.json", "files", "parts.jsonl", "run"
_T = TypeVar("_T")


class KeptParts:
    """The parts of a row that are done: first its run, then what is measured of it. See `kept_parts`.

    Attributes:
        files: Folder for the files of the run; empty until the run is made.
        seconds: What the parts took that were done before.
    """

    def __init__(self, folder: Path) -> None:
        self.files, self._path = folder / _FILES, folder / _PARTS
        self._cells = Cells(self._path, Console(quiet=True))
        self.seconds = self._cells.seconds
        if not self._cells.has(_RUN, {}):  # one that was stopped begins again
            with disk_errors(folder):
                shutil.rmtree(self.files, ignore_errors=True)
                self.files.mkdir(mode=0o700)

    def run(self, make: Callable[[], None]) -> None:
        """Make the run, unless it is done; `make` leaves its files in `files`."""

        def made() -> dict[str, Any]:
            make()
            return {}

        self._cells.get(_RUN, {}, made)

    def part(self, name: str, kind: type[_T], make: Callable[[], _T]) -> _T:
        """A part: as it was kept, or made now and kept.

        Args:
            kind: What pydantic writes as a JSON object and reads again.

        Raises:
            CheckpointError: What was kept is no such part.
            DiskError: It cannot be written.
        """
        form = TypeAdapter(kind)
        kept = self._cells.get(name, {}, lambda: form.dump_python(make(), mode="json"))
        try:
            return form.validate_python(kept)
        except ValidationError as error:
            raise CheckpointError(
                f"{self._path} has another form of {name!r}: remove {self._path.parent}, and the row is made again"
            ) from error


@contextmanager
def kept_parts(folder: Path, settings: Mapping[str, Any]) -> Iterator[KeptParts]:
    """The parts of a row in a folder, which is gone when the row is finished and stays where it was stopped.

    Args:
        settings: All that the row's result depends on, as JSON has it.

    Raises:
        CheckpointError: The folder is of other settings, or damaged.
        ConfigError: Another process makes the row.
        DiskError: The folder cannot be written.
    """
    with claim(folder):
        path = folder / _SETTINGS
        if path.exists() and _read(path) != settings:
            raise CheckpointError(
                f"{folder} is of a row under way with other settings: remove it, or give another --out"
            )
        with disk_errors(path):
            write_atomic(path, json.dumps(settings).encode())
        try:
            yield KeptParts(folder)
        except AttackLimitedError:  # what is said to do about it makes other settings of these
            shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: remove {path.parent}, and the row is made again") from error
