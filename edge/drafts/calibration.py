"""How often the cloud accepts a drafted token, learned while it happens. Pure."""

from __future__ import annotations

from collections.abc import Sequence

PRIOR_WEIGHT = 4.0
"""Tokens that a first guess counts as: few enough that a useless draft is found out within some ten tokens, and enough
that one chance rejection does not end a good one."""

BUCKET_MEMORY = 128.0
"""Tokens that a bucket counts at most, so that it follows a text that changes. The standard error of a rate of one
half is then 4 %."""

MEAN_MEMORY = 32.0
"""The same for the rate of all tokens. It is shorter since all buckets feed it, and a draft that was given up comes
back by it."""


class AcceptanceRate:
    """A rate of successes that follows what was seen lately: a Beta prior's mean with counts that are bounded.

    Args:
        guess: The rate before anything was seen, in [0, 1].
        memory: Trials that count at most.
    """

    def __init__(self, guess: float, memory: float) -> None:
        self._won, self._tried, self._memory = guess * PRIOR_WEIGHT, PRIOR_WEIGHT, memory

    @property
    def value(self) -> float:
        """The rate, in [0, 1]."""
        return self._won / self._tried

    def add(self, won: bool) -> None:
        """One more trial."""
        self._won, self._tried = self._won + won, self._tried + 1
        if self._tried > self._memory:
            self._won, self._tried = self._won * self._memory / self._tried, self._memory


class Calibration:
    """The acceptance rate of drafted tokens, once all before them are accepted: of each bucket, and of all.

    A bucket holds tokens of which the draft is equally sure; what it goes by is the draft's business.

    Args:
        guesses: The rate of each bucket before anything was seen, in [0, 1].
    """

    def __init__(self, guesses: Sequence[float]) -> None:
        self._buckets = [AcceptanceRate(guess, BUCKET_MEMORY) for guess in guesses]
        self._all = AcceptanceRate(0.5, MEAN_MEMORY)  # nothing is known: as likely as not

    @property
    def mean_rate(self) -> float:
        """The rate of tokens whose bucket is not known yet."""
        return self._all.value

    def rate(self, bucket: int) -> float:
        """The rate of a bucket's tokens."""
        return self._buckets[bucket].value

    def add(self, bucket: int, accepted: bool) -> None:
        """The cloud's answer about a token all before which were accepted."""
        self._buckets[bucket].add(accepted)
        self._all.add(accepted)
