"""The sessions that have been answered: which of them are still at work, and which are expected back soon."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class Answered:
    """What is known of a session that was answered.

    Attributes:
        tenant: Whose it is.
        at: When it was answered.
        positions: Token positions of the request.
        returned_after: Seconds that it took to ask again the last time; 0 where it never has.
    """

    tenant: str
    at: float
    positions: int
    returned_after: float = 0.0


@dataclass(slots=True)
class AnsweredSessions:
    """The last answer of each session, until `forget`.

    Args:
        longest: Seconds after which a session that is silent is not at work.
    """

    longest: float
    _answered: dict[bytes, Answered] = field(default_factory=dict)

    def answered(self, session: bytes, tenant: str, now: float, positions: int) -> None:
        """A session was answered."""
        before = self._answered.get(session)
        returned_after = 0.0 if before is None else before.returned_after
        self._answered[session] = Answered(tenant, now, positions, returned_after)

    def asks(self, session: bytes, now: float) -> None:
        """A session asks again."""
        last = self._answered.get(session)
        if last is not None:
            self._answered[session] = replace(last, returned_after=now - last.at)

    def forget(self, session: bytes) -> None:
        """A session is over."""
        self._answered.pop(session, None)

    def at_work(self, now: float) -> Iterator[tuple[bytes, Answered]]:
        """The sessions that were answered no longer ago than `longest`, also those that have asked again."""
        return ((session, last) for session, last in self._answered.items() if now - last.at <= self.longest)

    def expected(self, now: float) -> Iterator[Answered]:
        """Of these, the ones that have been away for no more than twice as long as the last time."""
        back = (last for _, last in self.at_work(now) if last.returned_after)
        return (last for last in back if now - last.at <= 2 * last.returned_after)
