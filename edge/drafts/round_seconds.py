"""Seconds that drafting and verifying take, estimated from recent rounds. Pure."""

from __future__ import annotations

MEMORY = 64.0
"""After so many further observations, an observation has 1/e of its weight. So a text of a few hundred tokens notices
that its link has changed, and averaging cuts the noise of single rounds to about a tenth."""

OUTLIER = 4.0
"""An observation counts as at most so many times the expected duration. A longer one waited for something else than its
tokens (a reconnect, another process). Of a link that stays slow, a few rounds raise the expectation."""


class FadingSums:
    """Sums in which older observations weigh less.

    Args:
        size: How many sums there are.
    """

    def __init__(self, size: int) -> None:
        self.values = [0.0] * size

    def add(self, *values: float) -> None:
        """Reduce the weight of what was added before, and add one observation: a value for each sum."""
        keep = 1 - 1 / MEMORY
        self.values = [keep * each + value for each, value in zip(self.values, values, strict=True)]


class MeanSeconds:
    """The mean of recent durations."""

    def __init__(self) -> None:
        self._sums = FadingSums(2)  # of the durations, and their number

    @property
    def value(self) -> float | None:
        """Seconds; None before the first one."""
        total, number = self._sums.values
        return total / number if number else None

    def add(self, seconds: float) -> None:
        """Add a duration, in seconds."""
        before = self.value
        self._sums.add(min(seconds, OUTLIER * before) if before else seconds, 1.0)


class RoundSeconds:
    """The seconds of a round that verifies k drafted tokens and one more: a line `a + b · k`, by least squares.

    Where all rounds had the same k, nothing is known of the slope, and it is 0.
    """

    def __init__(self) -> None:
        self._sums = FadingSums(5)  # number, k, k², seconds, k · seconds

    @property
    def known(self) -> bool:
        """Whether there was any round."""
        return self._sums.values[0] > 0

    @property
    def slope(self) -> float:
        """Seconds that one more drafted token adds, at least 0."""
        number, k, square, seconds, product = self._sums.values
        if not number:
            return 0.0
        # Ridge: as if one more observation, one token away from the mean, had the mean's seconds.
        spread = square - k * k / number + 1
        return max(0.0, (product - k * seconds / number) / spread)

    def at(self, drafted: int) -> float:
        """Seconds of a round that verifies so many drafted tokens; 0 before the first round."""
        number, k, _, seconds, _ = self._sums.values
        if not number:
            return 0.0
        return max(0.0, seconds / number + self.slope * (drafted - k / number))

    def add(self, drafted: int, seconds: float) -> float:
        """Add a round.

        Returns:
            The seconds that it counts as; see `OUTLIER`.
        """
        if self.known:
            number, _, _, total, _ = self._sums.values
            seconds = min(seconds, OUTLIER * max(self.at(drafted), total / number))  # the line may reach down to 0
        self._sums.add(1.0, float(drafted), float(drafted * drafted), seconds, drafted * seconds)
        return seconds
