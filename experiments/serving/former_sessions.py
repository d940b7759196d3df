"""What `former_scheduler.py` knows of sessions."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

THINK_SECONDS = 0.25
"""How long a session that nothing is known of yet counts as one that will ask again at any moment."""
OVERDUE = 3.0
"""A session that has taken so many times longer than it is expected to is not waited for."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A session that was answered: of which tenant, the kind of its next piece, since when, and the last one's size."""

    tenant: str
    then: str
    since: float
    positions: int


@dataclass(slots=True)
class Attendance:
    """Who else is at work.

    Sessions are expected back after the shorter of the last two times that they took. An average would remember for
    many steps that a session has evaluated, or has only begun.
    """

    _answered: dict[bytes, Answered] = field(default_factory=dict)
    _thinks: dict[tuple[bytes, str], tuple[float, float]] = field(default_factory=dict)  # session and kind -> seconds
    _mates: dict[bytes, frozenset[bytes]] = field(default_factory=dict)

    def answered(self, owner: bytes, answered: Answered) -> None:
        """A session was answered."""
        self._answered[owner] = answered

    def asks(self, owner: bytes, now: float) -> None:
        """A session asks again."""
        last = self._answered.pop(owner, None)
        if last is not None:
            took = now - last.since
            _, before = self._thinks.get((owner, last.then), (took, took))
            self._thinks[owner, last.then] = before, took

    def forget(self, owner: bytes) -> None:
        """A session is over."""
        self._answered.pop(owner, None)
        self._mates.pop(owner, None)
        self._thinks = {each: seconds for each, seconds in self._thinks.items() if each[0] != owner}

    def due(self, owner: bytes, now: float) -> float:
        """When a session is expected to ask again; infinity where it was not answered, or is long overdue."""
        last = self._answered.get(owner)
        if last is None:
            return math.inf
        thinks = self._thinks.get((owner, last.then))
        if thinks is None:
            return now if now <= last.since + THINK_SECONDS else math.inf
        think = min(thinks)
        return last.since + think if now <= last.since + OVERDUE * think else math.inf

    def is_away(self, owner: bytes) -> bool:
        """Whether a session was answered and has not asked again."""
        return owner in self._answered

    def was_answered(self, owner: bytes, since: float) -> bool:
        """Whether a session that has not asked again was answered after a moment."""
        return owner in self._answered and self._answered[owner].since >= since

    def coming(self, kind: str, now: float, among: Collection[bytes] | None = None) -> list[tuple[float, int]]:
        """When the sessions whose next piece is of a kind are expected, and the sizes of their last ones."""
        return [
            (moment, last.positions)
            for owner, last in self._answered.items()
            if last.then == kind and (among is None or owner in among) and (moment := self.due(owner, now)) < math.inf
        ]

    def expected(self, now: float) -> dict[bytes, Answered]:
        """The sessions that are expected back, and what is known of them."""
        return {owner: last for owner, last in self._answered.items() if self.due(owner, now) < math.inf}

    def together(self, owners: Iterable[bytes]) -> None:
        """These sessions' pieces are done together, and so had better be those that follow from them."""
        mates = frozenset(owners)
        self._mates.update(dict.fromkeys(mates, mates))

    def mates(self, owners: Iterable[bytes]) -> set[bytes]:
        """The sessions whose last pieces were done together with those of any of these."""
        return {mate for owner in owners for mate in self._mates.get(owner, ())}


@dataclass(slots=True)
class Open:
    """What pieces have left in memory, for a piece of the same session that takes it out.

    A session that leaves more there before it has taken out the last may never do so: until it takes something out,
    nothing that it has left counts, so that nobody waits for it.
    """

    _left: dict[bytes, tuple[int, int]] = field(default_factory=dict)  # of each: positions of the first, and how many

    def add(self, owner: bytes, positions: int) -> None:
        """A session's piece leaves something there."""
        first, count = self._left.get(owner, (positions, 0))
        self._left[owner] = first, count + 1

    def withdraw(self, owner: bytes) -> None:
        """A session's last piece has left nothing after all."""
        first, count = self._left.pop(owner, (0, 0))
        if count > 1:
            self._left[owner] = first, count - 1

    def forget(self, owner: bytes) -> None:
        """A session's piece has taken something out, or the session is over."""
        self._left.pop(owner, None)

    def owners(self) -> list[bytes]:
        """The sessions that have left something."""
        return [owner for owner, (_, count) in self._left.items() if count == 1]

    def positions(self, owners: Iterable[bytes]) -> int:
        """The token positions of what sessions have left."""
        left = (self._left.get(owner, (0, 0)) for owner in owners)
        return sum(first for first, count in left if count == 1)
