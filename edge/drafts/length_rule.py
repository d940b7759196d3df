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

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.edge.drafts.calibration import Calibration
from isthmus.edge.drafts.round_seconds import WINDOW, RecentMedian, RoundSeconds

MAX_DRAFT = 16
"""Tokens of a draft at most, whatever was measured: even where 19 of 20 are accepted, the next one is in 44 % of cases,
and the cloud computes all of them."""

FIRST_TOKENS = 5
"""Tokens that are drafted, one a round, before their median is believed. It is the least odd number whose median two
slow ones do not move: a draft's first pass reads its weights, and the second may stand behind a prompt."""

PLAIN_EVERY = WINDOW
"""Rounds with drafts after which one goes without: so that there is one among the rounds that are looked at."""

LOSS_SHARE = 0.01
"""Of the time, what may go into finding out whether drafts pay again where they did not."""

ALLOWANCE = 8.0
"""Rounds without drafts whose time drafts may lose before they have to pay for themselves. Chance takes some rounds'
time from a draft that pays in the long run; a text of some hundred tokens should not notice what one takes that does
not."""


@dataclass(frozen=True, slots=True)
class VerifiedRound:
    """What a round has done.

    Attributes:
        buckets: Those (see `Calibration`) of the tokens that it drafted.
        accepted: How many of these stand in the text.
        tokens: By how many tokens the text has grown.
        drafting_s: Seconds of drafting.
        verifying_s: Seconds of verifying; None where the round computed the prompt as well.
    """

    buckets: Sequence[int]
    accepted: int
    tokens: int
    drafting_s: float
    verifying_s: float | None

    @property
    def judged(self) -> int:
        """How many drafted tokens the cloud has decided about: none after a rejected one, nor after the text's end."""
        return min(len(self.buckets), self.tokens, self.accepted + 1)


class LengthRule(ABC):
    """Decides whether a draft gets one more token, and is told how it went."""

    @abstractmethod
    def should_draft(self, drafted: Sequence[int], next_bucket: int | None) -> bool:
        """Whether to draft one more token.

        Args:
            drafted: Buckets (see `Calibration`) of the tokens that this round has drafted.
            next_bucket: The bucket of the next one; None where that shows only once it is drafted.
        """

    def token_drafted(self, seconds: float) -> None:  # noqa: B027  # a rule need not learn
        """A token was drafted, which took so long."""

    def round_over(self, verified: VerifiedRound) -> None:  # noqa: B027  # a rule need not learn
        """A round was verified."""


class FixedLength(LengthRule):
    """Always the same number of tokens.

    Args:
        length: How many.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    def should_draft(self, drafted: Sequence[int], next_bucket: int | None) -> bool:
        """See `LengthRule`."""
        return len(drafted) < self.length


class AdaptiveLength(LengthRule):
    """As many tokens as pay, by what was measured; none where none do.

    What drafts lose against going without is kept within `ALLOWANCE` rounds and `LOSS_SHARE` of the time: an account
    of the seconds gained and lost has to be above 0. What a text's first draft takes, with the prompt, is in the
    account, too, but decides only from the next text on, as it is spent. Now and then a round goes without a draft, so
    that it is known what that takes, and one has a draft though the rule would have none, so that a better time for
    drafts is noticed.

    Args:
        guesses: The acceptance rate of each bucket before anything was seen; see `Calibration`.
        max_tokens: Of a draft.
    """

    def __init__(self, guesses: Sequence[float], max_tokens: int = MAX_DRAFT) -> None:
        self.max_tokens = max_tokens
        self.calibration = Calibration(guesses)
        self.rounds = RoundSeconds()
        self.draft = RecentMedian()
        self._recent: deque[tuple[float, int]] = deque(maxlen=WINDOW)  # seconds and tokens of rounds
        self._lost = 0.0  # seconds against going without drafts; below 0 is never kept
        self._since_plain = 0  # rounds since one without a draft
        self._since_draft = 0.0  # seconds since one with a draft
        self._has_caught_up = False  # whether the draft has taken in this text's prompt
        self._catch_up = 0.0  # seconds of its first draft, which are spent whether this text has further ones or not

    @property
    def seconds_per_token(self) -> float:
        """λ: seconds that a token takes at present, or takes without drafts where that is less."""
        if not self._recent:
            return self.rounds.base
        return min(self.rounds.base, sum(s for s, _ in self._recent) / sum(n for _, n in self._recent))

    @property
    def allowance(self) -> float:
        """Seconds that drafts may lose before they are off."""
        return ALLOWANCE * self.rounds.base

    def should_draft(self, drafted: Sequence[int], next_bucket: int | None) -> bool:
        """See `LengthRule`."""
        if not self.rounds or len(drafted) >= self.max_tokens or self._lost - self._catch_up >= self.allowance:
            return False
        if not drafted and self._since_plain >= PLAIN_EVERY:
            return False  # so that it stays known what a round without a draft takes
        if len(self.draft) < FIRST_TOKENS:
            return not drafted
        if not drafted and self.draft.least + self.rounds.slope <= LOSS_SHARE * self._since_draft:
            return True
        probability = self.calibration.mean_rate if next_bucket is None else self.calibration.rate(next_bucket)
        for bucket in drafted:
            probability *= self.calibration.rate(bucket)
        return probability * self.seconds_per_token > self.draft.value + self.rounds.slope

    def token_drafted(self, seconds: float) -> None:
        """See `LengthRule`. The first one of a text takes longer, as the draft takes in the prompt; few are that."""
        self.draft.add(seconds)

    def round_over(self, verified: VerifiedRound) -> None:
        """See `LengthRule`."""
        drafted = len(verified.buckets)
        for number, bucket in enumerate(verified.buckets[: verified.judged]):
            self.calibration.add(bucket, number < verified.accepted)
        if verified.verifying_s is None:
            self._has_caught_up, self._catch_up = False, 0.0
        else:
            self.rounds.add(drafted, verified.verifying_s)
            self._recent.append((verified.drafting_s + verified.verifying_s, verified.tokens))
            self._since_plain = self._since_plain + 1 if drafted else 0
        if drafted and not self._has_caught_up:
            self._has_caught_up, self._catch_up = True, verified.drafting_s
        usual_s = verified.drafting_s + self.rounds.at(drafted)  # a long wait for the cloud is no fault of the draft
        self._since_draft = 0.0 if drafted else self._since_draft + usual_s
        loss = usual_s - verified.tokens * self.rounds.base if drafted else 0.0
        self._lost = max(0.0, self._lost + loss - LOSS_SHARE * usual_s)
