"""Waiting times for peers that break the rules again and again, so that refusing them costs little. Pure.

After OpenSSH's `PerSourcePenalties`, but nobody is turned away, and nobody waits for another's offences: many edges
share an address, behind a proxy or in a hospital. A stream that has broken the rules is ended a little later, which
slows down whoever waits for its end. A key that has done so waits before its next session. Open sessions do not wait.
"""

from __future__ import annotations

from collections.abc import Callable

FREE = 5.0
"""Offences without a penalty: honest peers make a few mistakes."""
FORGIVEN_PER_SECOND = 0.5
"""So an address whose edges make one mistake in two seconds never waits."""
LONGEST_SECONDS = 3.0
"""Penalty at most: an honest edge with a defect waits as long, and gives up after a multiple of it."""
MAX_OFFENDERS = 1024
"""Offenders that are remembered; the one whose last offence is oldest is forgotten first."""


class Penalties:
    """Recent offences by peer, and how long each peer has to wait for them.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._offences: dict[str, tuple[float, float]] = {}  # count at a time; the latest offender is last

    def offended(self, who: str) -> None:
        """Count an offence of a peer."""
        count = min(self._count(who) + 1, FREE + LONGEST_SECONDS)
        self._offences.pop(who, None)
        self._offences[who] = count, self._clock()
        if len(self._offences) > MAX_OFFENDERS:
            del self._offences[next(iter(self._offences))]

    def pause(self, who: str) -> float:
        """Seconds that a peer has to wait now."""
        return max(0.0, self._count(who) - FREE)

    def _count(self, who: str) -> float:
        count, since = self._offences.get(who, (0.0, 0.0))
        return max(0.0, count - FORGIVEN_PER_SECOND * (self._clock() - since))
