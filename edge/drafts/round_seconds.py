"""What drafting and verifying cost, in seconds, learned while it happens. Pure."""

from __future__ import annotations

MEMORY = 64.0
"""Observations that count: an older one fades by 1/e in so many. A text of a few hundred tokens notices a link that has
changed, and the noise of single rounds is averaged to about a tenth."""

OUTLIER = 4.0
"""Times what was expected that an observation counts as at most. A longer one waited for something else than its tokens
(a reconnect, another process); a link that has become slow for good is believed after a few rounds."""


class FadingSums:
    """Sums in which what is older counts less.

    Args:
        size: How many there are.
    """

    def __init__(self, size: int) -> None:
        self.values = [0.0] * size

    def add(self, *values: float) -> None:
        """Let all fade by one observation, and add another."""
        keep = 1 - 1 / MEMORY
        self.values = [keep * each + value for each, value in zip(self.values, values, strict=True)]


class MeanSeconds:
    """The mean of some durations."""

    def __init__(self) -> None:
        self._sums = FadingSums(2)  # of the durations, and their number

    @property
    def value(self) -> float | None:
        """Seconds; None before the first one."""
        total, number = self._sums.values
        return total / number if number else None

    def add(self, seconds: float) -> None:
        """One more duration, in seconds."""
        before = self.value
        self._sums.add(min(seconds, OUTLIER * before) if before else seconds, 1.0)


class RoundSeconds:
    """The seconds of a round that verifies k drafted tokens and one more: a line `a + b · k`, by least squares.

    Where all rounds had the same k, the slope is 0: a cost that was not seen is taken for none until it is.
    """

    def __init__(self) -> None:
        self._sums = FadingSums(5)  # number, k, k², seconds, k · seconds

    @property
    def known(self) -> bool:
        """Whether there was a round."""
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
        """One more round.

        Returns:
            The seconds that it counts as.
        """
        if self.known:
            number, _, _, total, _ = self._sums.values
            seconds = min(seconds, OUTLIER * max(self.at(drafted), total / number))  # the line may reach down to 0
        self._sums.add(1.0, float(drafted), float(drafted * drafted), seconds, drafted * seconds)
        return seconds
