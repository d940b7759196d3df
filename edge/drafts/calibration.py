"""How often verification accepts a drafted token: rates that each answer of the cloud updates. Pure."""

from __future__ import annotations

from collections.abc import Sequence

PRIOR_WEIGHT = 4.0
"""Trials that a first guess weighs as much as. They are so few that about ten tokens show a useless draft, and so many
that one chance rejection does not end a good one."""

BUCKET_MEMORY = 128.0
"""Trials that a bucket's rate is a mean over, at most, so that it follows a text that changes. The standard error of a
rate of one half is then 4 %."""

MEAN_MEMORY = 32.0
"""The same for the rate over all buckets. It is shorter, because tokens of all buckets count in it, and because it has
to rise soon where drafts pay again."""


class AcceptanceRate:
    """The share of recent trials that succeeded: the mean of a Beta distribution whose counts are bounded.

    Args:
        guess: The rate before anything was seen, in [0, 1].
        memory: Trials that the rate is a mean over, at most.
    """

    def __init__(self, guess: float, memory: float) -> None:
        self._successes, self._trials, self._memory = guess * PRIOR_WEIGHT, PRIOR_WEIGHT, memory

    @property
    def value(self) -> float:
        """The rate, in [0, 1]."""
        return self._successes / self._trials

    def add(self, success: bool) -> None:
        """Count one more trial."""
        self._successes, self._trials = self._successes + success, self._trials + 1
        if self._trials > self._memory:
            self._successes, self._trials = self._successes * self._memory / self._trials, self._memory


class Calibration:
    """The acceptance rate of drafted tokens, once all before them are accepted: of each bucket, and over all.

    A bucket holds tokens of which the draft is about equally sure. The draft decides which bucket a token is in.

    Args:
        guesses: The rate of each bucket before anything was seen, in [0, 1].
    """

    def __init__(self, guesses: Sequence[float]) -> None:
        self._buckets = [AcceptanceRate(guess, BUCKET_MEMORY) for guess in guesses]
        self._all = AcceptanceRate(0.5, MEAN_MEMORY)  # nothing is known: as likely as not

    @property
    def mean_rate(self) -> float:
        """The rate over all buckets, for a token whose bucket is not known yet."""
        return self._all.value

    def rate(self, bucket: int) -> float:
        """The rate of a bucket."""
        return self._buckets[bucket].value

    def add(self, bucket: int, accepted: bool) -> None:
        """Count whether a token was accepted; all before it in its draft were."""
        self._buckets[bucket].add(accepted)
        self._all.add(accepted)
