"""How many tokens a draft has. Pure: seconds come from outside.

A round drafts k tokens and verifies them; it takes `draft + T(k)` seconds and gives the accepted ones and one more. The
fewest seconds a token are reached by drafting one more token as long as

    P(it is accepted) · λ  >  c + Δ        P = p₁ · Π cal(confᵢ) over the tokens drafted before it

with λ the seconds that a token takes at present (what an accepted one saves), c those of drafting one, and Δ those that
one more token adds to the verification. That is the condition of an optimum of a ratio (Dinkelbach 1967): with the λ
that the rule reaches, it is the best of all such rules. A token's own confidence is not looked at before it is drafted:
leaving out a sampled token because of what it is would change the distribution of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from isthmus.edge.drafts.calibration import Calibration
from isthmus.edge.drafts.round_seconds import MEMORY, FadingSums, MeanSeconds, RoundSeconds

MAX_DRAFT = 16
"""Tokens of a draft at most, whatever was measured: even where 19 of 20 are accepted, the next one is in 44 % of cases,
and the cloud computes all of them."""

LOSS_SHARE = 0.01
"""Of the time, what may go into finding out whether drafts pay again where they did not."""

ALLOWANCE = 8.0
"""Rounds without drafts whose time drafts may lose before they have to pay for themselves. Chance takes some rounds'
time from a draft that pays in the long run; a text of some hundred tokens should not notice what one takes that does
not."""


class LengthRule(Protocol):
    """Decides whether a draft gets one more token, and is told how it went."""

    def wants(self, drafted: Sequence[int], upcoming: int | None) -> bool:
        """Whether to draft one more token.

        Args:
            drafted: Buckets (see `Calibration`) of the tokens that this round has drafted.
            upcoming: The bucket of the next one; None where that shows only once it is drafted.
        """

    def token_drafted(self, seconds: float, passed: int = 1) -> None:
        """A token was drafted, which took so long; the draft had to take in so many tokens of the text for it."""

    def round_over(
        self, drafted: Sequence[int], accepted: int, judged: int, tokens: int, seconds: tuple[float, float] | None
    ) -> None:
        """A round was verified.

        Args:
            drafted: The buckets of its tokens.
            accepted: How many of them stand in the text.
            judged: How many of them the cloud has decided about: those after a rejected one it has not.
            tokens: By how many tokens the text has grown.
            seconds: Of drafting, and of verifying; None where the round did something else as well.
        """


class FixedLength:
    """Always the same number of tokens.

    Args:
        length: How many.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    def wants(self, drafted: Sequence[int], upcoming: int | None) -> bool:
        """See `LengthRule`."""
        return len(drafted) < self.length

    def token_drafted(self, seconds: float, passed: int = 1) -> None:
        """See `LengthRule`; it learns nothing."""

    def round_over(
        self, drafted: Sequence[int], accepted: int, judged: int, tokens: int, seconds: tuple[float, float] | None
    ) -> None:
        """See `LengthRule`; it learns nothing."""


class AdaptiveLength:
    """As many tokens as pay, by what was measured; none where none do.

    What drafts lose against going without is kept within `ALLOWANCE` rounds and `LOSS_SHARE` of the time: an account
    of the seconds gained and lost has to be above 0. Now and then a round goes without a draft, so that it is known
    what that takes, and one has a draft though the rule would have none, so that a better time for drafts is noticed.

    Args:
        guesses: The share of accepted tokens of each bucket before anything was seen; see `Calibration`.
        max_tokens: Of a draft.
    """

    def __init__(self, guesses: Sequence[float], max_tokens: int = MAX_DRAFT) -> None:
        self.max_tokens = max_tokens
        self.calibration = Calibration(guesses)
        self.rounds = RoundSeconds()
        self.draft = MeanSeconds()
        self._seconds_and_tokens = FadingSums(2)
        self._lost = 0.0  # seconds against going without drafts; below 0 is never kept
        self._since_plain = 0  # rounds since one without a draft
        self._since_draft = 0.0  # seconds since one with a draft
        self._after_hit = False  # whether the last draft had a token that was accepted

    @property
    def seconds_a_token(self) -> float:
        """λ: seconds that a token takes at present, or takes without drafts where that is less."""
        seconds, tokens = self._seconds_and_tokens.values
        without = self.rounds.at(0)
        return min(without, seconds / tokens) if tokens else without

    @property
    def allowance(self) -> float:
        """Seconds that drafts may lose before they are off."""
        return ALLOWANCE * self.rounds.at(0)

    def wants(self, drafted: Sequence[int], upcoming: int | None) -> bool:
        """See `LengthRule`."""
        if not self.rounds.known or len(drafted) >= self.max_tokens or self._lost >= self.allowance:
            return False
        if not drafted and self._since_plain >= MEMORY:
            return False  # so that it stays known what a round without a draft takes
        if self.draft.value is None:
            return not drafted  # one, to see what it takes
        cost = self.draft.value + self.rounds.slope
        saved = self.seconds_a_token
        if not drafted and cost < saved and (self._after_hit or cost <= LOSS_SHARE * self._since_draft):
            return True
        probability = self.calibration.mean if upcoming is None else self.calibration.share(upcoming)
        for bucket in drafted:
            probability *= self.calibration.share(bucket)
        return probability * saved > cost

    def token_drafted(self, seconds: float, passed: int = 1) -> None:
        """See `LengthRule`. What it takes to catch up with a text is not what a token takes while drafts go on."""
        if passed <= self.max_tokens + 1:  # a round brings no more
            self.draft.add(seconds)

    def round_over(
        self, drafted: Sequence[int], accepted: int, judged: int, tokens: int, seconds: tuple[float, float] | None
    ) -> None:
        """See `LengthRule`."""
        for number, bucket in enumerate(drafted[:judged]):
            self.calibration.add(bucket, number < accepted)
        if seconds is None:
            return
        drafting, verifying = seconds
        total = drafting + self.rounds.add(len(drafted), verifying)
        self._seconds_and_tokens.add(total, float(tokens))
        self._since_plain = self._since_plain + 1 if drafted else 0
        self._since_draft = 0.0 if drafted else self._since_draft + total
        self._after_hit = accepted > 0 if drafted else self._after_hit
        loss = total - tokens * self.rounds.at(0) if drafted else 0.0
        self._lost = max(0.0, self._lost + loss - LOSS_SHARE * total)
