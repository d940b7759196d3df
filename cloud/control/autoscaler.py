"""How many workers there should be, from how many calls wait. Pure, with an injected clock.

A worker is started when calls have been overdue for some seconds, and one is ended when none has waited for a minute.
Growing is quick and shrinking slow, so that a load that comes and goes does not start and stop workers all the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

GROW_DEPTH = 1.0
"""With so many overdue calls per worker, or more, there are too few workers."""
GROW_SECONDS = 5.0
"""For which calls must have been overdue: a burst of several edges' steps is over by then."""
SHRINK_SECONDS = 60.0
"""For which no call must have waited: longer than edges evaluate or write a checkpoint between two steps."""
PAUSE_SECONDS = 15.0
"""After a change, until the next one: a new worker loads its model, and sessions move to it."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a worker has to do.

    Attributes:
        waiting: calls that wait.
        overdue: those that have waited for longer than to fill a batch.
        sessions: open sessions.
    """

    waiting: int
    overdue: int
    sessions: int


@dataclass(frozen=True, slots=True)
class Change:
    """Start the worker of a number, or drain and end it."""

    number: int
    start: bool


class Scaler:
    """Decides when a worker is started or ended.

    Args:
        least: workers that there are at least, 1 or more: those with the lowest numbers.
        most: workers that there are at most.
        clock: seconds that never go back.
    """

    def __init__(self, least: int, most: int, clock: Callable[[], float]) -> None:
        self._least, self._most, self._clock = least, most, clock
        self._busy_since: float | None = None
        self._calm_since: float | None = None
        self._rest_until = 0.0

    def decide(self, loads: Mapping[int, Load]) -> Change | None:
        """The change that is due, if one is; to be called every second or so.

        The first `least` workers are never ended: edges connect to the address of the first one.

        Args:
            loads: of the workers that serve, by number.
        """
        now = self._clock()
        if self._least == self._most or not loads:
            return None
        busy = sum(load.overdue for load in loads.values()) >= GROW_DEPTH * len(loads)
        calm = not any(load.waiting for load in loads.values())
        self._busy_since = since(self._busy_since, now) if busy else None
        self._calm_since = since(self._calm_since, now) if calm else None
        if now < self._rest_until:
            return None
        change = None
        if self._busy_since is not None and now - self._busy_since >= GROW_SECONDS and len(loads) < self._most:
            change = Change(min(set(range(self._most)) - set(loads)), start=True)
        elif self._calm_since is not None and now - self._calm_since >= SHRINK_SECONDS:
            spare = [number for number in loads if number >= self._least]
            if spare:
                change = Change(min(spare, key=lambda number: (loads[number].sessions, -number)), start=False)
        if change is not None:
            self._busy_since = self._calm_since = None
            self._rest_until = now + PAUSE_SECONDS
        return change


def since(begun: float | None, now: float) -> float:
    """When a condition that holds now has begun: at `begun`, or now."""
    return now if begun is None else begun
