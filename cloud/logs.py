"""Structured logs: one JSON object a line, of events and counts.

Activations, texts, keys and tokens have no field to be in.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path

LOGGER = logging.getLogger("isthmus")  # of all folders: the kernels say what they do without

LOG_BYTES = 64 << 20
"""Of a log file; the one before is kept beside it. Strangers cause lines too, and must not fill the disk."""


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


def log_to(path: Path | None) -> None:
    """Send the cloud's log to a file, or to standard error where `path` is None."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if path is not None:
        handler = RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=1)
    handler.setFormatter(JsonFormatter())
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False


def log(event: str, level: int = logging.INFO, **fields: object) -> None:
    """Write one event."""
    LOGGER.log(level, event, extra={"fields": fields})
