"""The history of a worker's sessions and calls, which `isthmus bench chaos` checks afterwards.

Nothing is written unless the environment variable `ISTHMUS_HISTORY` names a folder when the cloud is started. Each
process then appends to a file of its own, `PID.jsonl`, one JSON object a line, each in one write: a process that is
killed leaves whole lines. Times are of the machine's monotonic clock, which all processes share. Events hold ids and
counts, no keys and no content.

| event | fields | when |
|---|---|---|
| `heard` | | a report of the other workers has come |
| `opened` | `session`, `link`, `tenant`, `allowed` | a session was admitted; `allowed` is its tenant's `max-sessions` |
| `ended` | `session`, `why` | a session has to end; `why` is `fenced` where its link has a newer one |
| `closed` | `session` | a session is no longer counted |
| `answered` | `session`, `link`, `kind`, `call` | an answer begins to be sent |

`call` is `[step, call, attempt]` where the answer is a call's result, else null.
"""

from __future__ import annotations

import functools
import json
import os
import time
from pathlib import Path
from typing import Final

ENVIRONMENT: Final = "ISTHMUS_HISTORY"


def is_written() -> bool:
    """Whether the environment asks for a history."""
    return bool(os.environ.get(ENVIRONMENT))


def record(event: str, **fields: object) -> None:
    """Append an event to the history of this process, where one is written."""
    folder = os.environ.get(ENVIRONMENT)
    if folder:
        line = json.dumps({"at": time.monotonic(), "event": event, **fields})
        os.write(_file(folder, os.getpid()), f"{line}\n".encode())


@functools.cache
def _file(folder: str, pid: int) -> int:
    path = Path(folder) / f"{pid}.jsonl"
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
