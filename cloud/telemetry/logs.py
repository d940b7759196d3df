"""Structured logs: one JSON object a line, with events and counts.

No field holds activations, texts, keys or tokens. Each process has a file of its own: a file that several processes
rotate loses lines, as one goes on writing to the file that another has moved away.

    worker.log, worker-1.log, …   the workers', by number
    controller.log                the controller's
    serve.log                     the supervisor's
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

LOGGER = logging.getLogger("isthmus")  # of all packages: the kernels log what they have to do without

LOG_BYTES = 64 << 20
"""Size at which a log file is rotated; one older file is kept. Strangers cause lines too, and must not fill disks."""


class _PrivateFileHandler(RotatingFileHandler):
    """Makes files that only this user can read, as they name tenants."""

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        os.fchmod(descriptor, 0o600)
        return open(descriptor, "a", encoding=self.encoding)  # noqa: PTH123  # a descriptor, not a path


class JsonFormatter(logging.Formatter):
    """`{"time": …, "level": …, "event": …, …}`; the fields come from `extra={"fields": {…}}`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = f"{record.exc_info[0].__name__}: {record.exc_info[1]}"
        return json.dumps(line)


def log_file(home: Path, process: str, number: int = 0) -> Path:
    """The log file of a process of a cloud with this home; `number` is the worker's."""
    return home / (f"{process}-{number}.log" if number else f"{process}.log")


def log_to(path: Path | None) -> None:
    """Send the cloud's log to a file, or to standard error where `path` is None."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if path is not None:
        handler = _PrivateFileHandler(path, maxBytes=LOG_BYTES, backupCount=1)
    handler.setFormatter(JsonFormatter())
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False


def log(event: str, level: int = logging.INFO, **fields: object) -> None:
    """Write one event."""
    LOGGER.log(level, event, extra={"fields": fields})
