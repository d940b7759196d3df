"""Pauses for those who break the rules again and again, so that what it costs to refuse them is bounded. Pure.

After OpenSSH's `PerSourcePenalties`, but nobody is turned away: addresses are shared, by a proxy's edges or a
hospital's, so whoever comes from the same one only waits a little longer to be admitted. Open sessions feel nothing.
"""

from __future__ import annotations

from collections.abc import Callable

FREE = 5.0
"""Offences that cost nothing, as honest mistakes are few."""
FORGIVEN_PER_SECOND = 0.5
LONGEST_SECONDS = 3.0
MAX_OFFENDERS = 1024
"""That are remembered; those that have been quiet for longest are forgotten first."""


class Penalties:
    """Who has offended lately, and how long that keeps them waiting.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._offences: dict[str, tuple[float, float]] = {}  # how many are not forgiven, as of when; the latest last

    def offended(self, who: str) -> None:
        """Somebody has broken the rules."""
        count = min(self._count(who) + 1, FREE + LONGEST_SECONDS)
        self._offences.pop(who, None)
        self._offences[who] = count, self._clock()
        if len(self._offences) > MAX_OFFENDERS:
            del self._offences[next(iter(self._offences))]

    def pause(self, who: str) -> float:
        """Seconds that somebody has to wait now."""
        return max(0.0, self._count(who) - FREE)

    def _count(self, who: str) -> float:
        count, since = self._offences.get(who, (0.0, 0.0))
        return max(0.0, count - FORGIVEN_PER_SECOND * (self._clock() - since))
