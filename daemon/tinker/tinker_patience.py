"""What the queues try again, how often, and after which pauses."""

from __future__ import annotations

from isthmus.common.errors import (
    CloudFailedError,
    ConnectionLostError,
    DrainingError,
    OverQuotaError,
    RefusedError,
    UnreachableError,
)
from isthmus.daemon.tinker.promises import Told, told_refusal
from isthmus.daemon.tinker.refusal import RefusalError
from isthmus.daemon.workers.asking import WorkerError

PASSING = (UnreachableError, ConnectionLostError, DrainingError, OverQuotaError, CloudFailedError)
"""What a cloud gets over: what was asked waits. It is what jobs wait for, too."""
MINE = frozenset({1, 51, 52, 62})
"""Exit codes (docs/exit-codes.md) that are no fault of the client."""
MOST_REFUSED = 100
"""Times that a cloud may decline something, about 50 minutes. A drain or a quota passes; that a request makes no sense
has the same code, and does not."""
MOST_FAILURES = 3
"""Times that a promise meets a defect, or a disk that fails, after which it is refused."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before something is tried again; each pause is twice the one before."""

_PASSING_CODES = frozenset(error.exit_code for error in PASSING)


def passes(error: WorkerError, tries: int) -> bool:
    """Whether what met an error, in so many tries, is tried again."""
    return error.code in _PASSING_CODES and (error.code != RefusedError.exit_code or tries < MOST_REFUSED)


def pause_after(tries: int) -> float:
    """Seconds until the next try."""
    return min(FIRST_PAUSE * 2.0 ** min(tries - 1, 10), LONGEST_PAUSE)


def told_failure(failures: int, error: Exception) -> Told:
    """The refusal of what meets a defect whenever it is tried. What the error says stays in the log."""
    why = f"it has failed {failures} times here ({type(error).__name__}): see the daemon's log"
    return told_refusal(RefusalError(why, "server"))
