"""How many workers there should be, by how many calls wait. Pure, with an injected clock.

A worker is added when calls have been overdue for a while, and one goes when for a longer while none has waited.
Growing is quick and shrinking slow, so that a load that comes and goes does not start and stop workers all the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

GROW_DEPTH = 1.0
"""Overdue calls per worker from which on there are too few workers."""
GROW_SECONDS = 5.0
SHRINK_SECONDS = 60.0
PAUSE_SECONDS = 15.0
"""After a change, until the next one: a new worker loads its model, and sessions move to it."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a worker has to do: calls that wait, those of them that wait for longer than for company, open sessions."""

    waiting: int
    overdue: int
    sessions: int


@dataclass(frozen=True, slots=True)
class Change:
    """What is to be done: start the worker of a number that there is none of, or drain and end it."""

    number: int
    start: bool


class Scaler:
    """Says when a worker is to be started or ended.

    Args:
        least: workers that there always are; the first ones, one at least.
        most: workers that there are at most.
        clock: seconds that never go back.
    """

    def __init__(self, least: int, most: int, clock: Callable[[], float]) -> None:
        self._least, self._most, self._clock = least, most, clock
        self._busy_since: float | None = None
        self._calm_since: float | None = None
        self._rest_until = 0.0

    def decide(self, loads: Mapping[int, Load]) -> Change | None:
        """Look at the workers that serve, by number; to be called every second or so.

        The first `least` workers are never ended: the address that edges connect to is the first one's.
        """
        now = self._clock()
        if self._least == self._most or not loads:
            return None
        busy = sum(load.overdue for load in loads.values()) >= GROW_DEPTH * len(loads)
        calm = not any(load.waiting for load in loads.values())
        self._busy_since = _since(self._busy_since, now) if busy else None
        self._calm_since = _since(self._calm_since, now) if calm else None
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


def _since(begun: float | None, now: float) -> float:
    return now if begun is None else begun
