"""Finished work of a long table on the disk, a line for each result, so that an interrupted table goes on."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from isthmus.common.errors import CheckpointError
from isthmus.common.files import disk_errors, locked


class Cells:
    """Results by the settings that they depend on, in a file of JSON lines that only grows.

    Args:
        path: The file; made with its folder when it is needed. Several processes may add to it.

    Attributes:
        path: As given.

    Raises:
        CheckpointError: A line of the file is damaged.
        DiskError: The file cannot be read or written.
    """

    def __init__(self, path: Path, console: Console) -> None:
        self.path = path
        self._console = console
        self._total = self._done = 0
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._known = _read(path) if path.exists() else {}
        self._asked: dict[str, float] = {}

    def expect(self, total: int) -> None:
        """How many there will be, for the progress."""
        self._total = total

    @property
    def seconds(self) -> float:
        """What the results took that `get` has returned, each counted once, whether it was made now or before."""
        return sum(self._asked.values())

    def get(self, name: str, settings: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result for these settings: from the file, or made now and written.

        Raises DiskError where the disk is full or cannot be written.
        """
        self._done += 1
        key = _key(name, settings)
        if key not in self._known:
            started = time.monotonic()
            result = make()
            seconds = round(time.monotonic() - started, 1)
            made = {"name": name, "settings": dict(settings), "seconds": seconds, "result": result}
            self._append(made)
            self._known[key] = made
            self._console.print(f"[{self._done}/{self._total}] {name}  {seconds:.0f} s", markup=False, highlight=False)
        self._asked[key] = self._known[key]["seconds"]
        found: dict[str, Any] = self._known[key]["result"]
        return found

    def _append(self, cell: dict[str, Any]) -> None:
        with locked(self.path), disk_errors(self.path), self.path.open("ab") as file:
            if file.tell() and not _ends_whole(self.path):
                file.write(b"\n")  # what a full disk or a crash cut off stays a line of its own
            file.write((json.dumps(cell) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())


def _key(name: str, settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(f"{name} {json.dumps(dict(settings), sort_keys=True)}".encode()).hexdigest()


def _read(path: Path) -> dict[str, dict[str, Any]]:
    known = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            cell = json.loads(line)
            known[_key(cell["name"], cell["settings"])] = {name: cell[name] for name in ("result", "seconds")}
        except json.JSONDecodeError:
            continue  # cut off while it was written: the result is made again
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}, line {number}: no finished result of a table; remove the line") from error
    return known


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
