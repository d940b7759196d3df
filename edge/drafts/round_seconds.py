"""What drafting and verifying take, in seconds, learned while it happens. Pure."""

from __future__ import annotations

from collections import deque
from statistics import median

import numpy as np

WINDOW = 64
"""Rounds and drafted tokens that are looked at. A text of a few hundred tokens notices a link that has changed, and
medians of so many change little from one round to the next."""


class RecentMedian:
    """The median of the newest durations: a few that waited for something else (another process) do not move it."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def __len__(self) -> int:
        return len(self._recent)

    @property
    def value(self) -> float:
        """Seconds; 0 before the first one."""
        return median(self._recent) if self._recent else 0.0

    @property
    def least(self) -> float:
        """The shortest of them, in seconds; 0 before the first one."""
        return min(self._recent, default=0.0)

    def add(self, seconds: float) -> None:
        """One more duration."""
        self._recent.append(seconds)


class RoundSeconds:
    """The seconds of a round that verifies k drafted tokens and one more: a line `base + slope · k`.

    The line is that of Theil (1950) and Sen (1968): the slope is the median of the slopes between each two of the
    newest rounds, and the base is the median of what it leaves. Rounds that waited for something else (a reconnect,
    another process) do not move it as long as they are few.

    Attributes:
        base: Seconds of a round without a draft; 0 before the first round.
        slope: Seconds that each drafted token adds, at least 0. A cost that was not seen is taken for none: where all
            rounds had the same k, the slope is 0.
    """

    def __init__(self) -> None:
        self.base = self.slope = 0.0
        self._recent: deque[tuple[int, float]] = deque(maxlen=WINDOW)

    def __len__(self) -> int:
        return len(self._recent)

    def at(self, drafted: int) -> float:
        """Seconds of a round that verifies so many drafted tokens."""
        return self.base + self.slope * drafted

    def add(self, drafted: int, seconds: float) -> None:
        """One more round."""
        self._recent.append((drafted, seconds))
        tokens, spent = np.array(self._recent).T
        further, longer = tokens[:, None] - tokens, spent[:, None] - spent
        slopes = longer[further > 0] / further[further > 0]
        self.slope = max(0.0, float(np.median(slopes))) if slopes.size else 0.0
        self.base = max(0.0, float(np.median(spent - self.slope * tokens)))
