"""The daemon's log: a file in its home, of which older parts are kept up to a bound, and standard error."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO

from isthmus.common.files import disk_errors, private_opener
from isthmus.common.terminal import printable

MOST = 4 << 20
"""Bytes of a file."""
KEPT = 3
"""Older files."""


class _Line(logging.Formatter):
    """Time, level, message. What a client has sent cannot begin a line, nor move a terminal's cursor."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's own name
        """The line."""
        return printable(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        """The line, and below it the traceback, where there is one. It is indented: it may quote what a client sent."""
        line, *traceback = super().format(record).splitlines()
        return "\n".join([line, *(f"    {printable(each)}" for each in traceback)])


class _PrivateFile(RotatingFileHandler):
    """A log and its older files, which their user alone may read."""

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding=self.encoding, opener=private_opener)


@contextmanager
def logging_to(path: Path, *, to_stderr: bool) -> Iterator[None]:
    """Let what the daemon says go to a file, and to standard error where it is wanted.

    Raises:
        DiskError: The file cannot be written.
    """
    with disk_errors(path):
        handlers: list[logging.Handler] = [_PrivateFile(path, maxBytes=MOST, backupCount=KEPT, encoding="utf-8")]
    if to_stderr:
        handlers.append(logging.StreamHandler(sys.stderr))
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.INFO)
    for name in ("alembic", "uvicorn", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for handler in handlers:
        handler.setFormatter(_Line())
        root.addHandler(handler)
    try:
        yield
    finally:
        root.setLevel(before)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a log; those of the file before it where it has fewer. Empty where there is none."""
    lines: list[str] = []
    for file in (path, path.with_name(f"{path.name}.1")):
        if len(lines) < count and file.exists():
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()[-(count - len(lines)) :] + lines
    return lines


def new_lines(path: Path, pause: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """Lines that are added to a log from now on, without an end; a file that takes its place is gone on with."""
    file: IO[str] | None = None
    try:
        file = _opened(path)
        if file is not None:
            file.seek(0, os.SEEK_END)
        while True:
            if file is None:
                file = _opened(path)
            if file is not None:
                yield from (line.rstrip("\n") for line in file)
                if _is_replaced(path, file):
                    yield from (line.rstrip("\n") for line in file)
                    file.close()
                    file = None
                    continue
            pause(0.2)
    finally:
        if file is not None:
            file.close()


def _opened(path: Path) -> IO[str] | None:
    try:
        return path.open(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _is_replaced(path: Path, file: IO[str]) -> bool:
    try:
        return path.stat().st_ino != os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False
