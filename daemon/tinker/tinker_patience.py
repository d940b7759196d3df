"""What the queues try again, how often, and after which pauses."""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.common.errors import (
    CloudFailedError,
    ConnectionLostError,
    DrainingError,
    OverQuotaError,
    TooManySessionsError,
    UnreachableError,
)
from isthmus.daemon.tinker.promises import Told, told_refusal
from isthmus.daemon.tinker.refusal import RefusalError
from isthmus.daemon.workers.asking import WorkerError

WAITS = (UnreachableError, ConnectionLostError, DrainingError, TooManySessionsError)
"""What passes by itself, if only after hours: a promise waits for its end."""
MAY_PASS = (OverQuotaError, CloudFailedError)
"""What passes where a cloud had too little memory just then, and does not where a request is too large for it."""
MOST_REFUSED = 20
"""Times that a promise meets something that may pass, over about 8 minutes, after which it is refused. Waits for what
passes by itself do not count."""
DEFECT = 1
"""The code of a defect of a process, after which nobody knows what it holds."""
MOST_DEATHS = 3
"""Times that a process dies at a promise, or meets a defect, after which the promise is refused."""
MINE = frozenset({DEFECT, 51, 52, 62})
"""Exit codes (docs/exit-codes.md) that are no fault of the client."""
MOST_FAILURES = 3
"""Times that a promise meets a defect, or a disk that fails, after which it is refused."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before something is tried again; each pause is twice the one before."""

_WAITS = frozenset(error.__name__ for error in WAITS)
_MAY_PASS = frozenset(error.__name__ for error in MAY_PASS)


@dataclass(slots=True)
class Waits:
    """How often a promise was put off.

    Attributes:
        times: In all.
        declined: By something that may pass.
    """

    times: int = 0
    declined: int = 0

    def passes(self, error: WorkerError) -> bool:
        """Whether what met an error is tried again. To be asked once for each error."""
        if error.kind in _MAY_PASS:
            self.declined += 1
            return self.declined < MOST_REFUSED
        return error.kind in _WAITS

    def pause(self) -> float:
        """Seconds until the next try."""
        self.times += 1
        return pause_after(self.times)


def pause_after(tries: int) -> float:
    """Seconds until the next try."""
    return min(FIRST_PAUSE * 2.0 ** min(tries - 1, 10), LONGEST_PAUSE)


def told_failure(failures: int, error: Exception) -> Told:
    """The refusal of what meets a defect whenever it is tried. What the error says stays in the log."""
    why = f"it has failed {failures} times here ({type(error).__name__}): see the daemon's log"
    return told_refusal(RefusalError(why, "server"))
