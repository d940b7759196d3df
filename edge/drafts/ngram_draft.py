"""Drafts from the text itself: what followed the last few tokens where they occurred before (prompt lookup)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from isthmus.edge.drafts.candidates import Choose, Draft, DraftedToken
from isthmus.edge.drafts.length_rule import AdaptiveLength, LengthRule

LONGEST_NGRAM = 5
"""Tokens that are compared at most. Places that agree in five tokens hardly ever continue differently, and each further
size of n-gram is one more entry for each token of the text."""


class NgramDraft(Draft):
    """Finds the longest n-gram at the text's end that occurred before, and drafts what followed its latest occurrence.

    A token's bucket says how many tokens before it agree, up to `LONGEST_NGRAM`. Each drafted token counts as one.

    Args:
        rule: How long a draft is; None for one that adapts.
        clock: Returns seconds.
    """

    def __init__(self, rule: LengthRule | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(rule or AdaptiveLength([0.5] * LONGEST_NGRAM), clock)  # before anything is known

    def proposer(self) -> NgramProposer:
        """See `Draft`."""
        return NgramProposer()


class NgramProposer:
    """See `isthmus.edge.drafts.candidates.Proposer`."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> place of the token after its latest occurrence
        self._text: list[int] = []
        self._indexed = 1  # places below this one are in `_after`
        self._at: int | None = None  # place of the token that is copied next
        self._agreeing = 0

    def follow(self, text: Sequence[int]) -> None:
        """See `Proposer`."""
        self._text = list(text)
        for place in range(self._indexed, len(text)):
            for size in range(1, min(LONGEST_NGRAM, place) + 1):
                self._after[tuple(self._text[place - size : place])] = place
        self._indexed = max(1, len(text))
        self._at, self._agreeing = None, 0
        for size in range(min(LONGEST_NGRAM, len(text)), 0, -1):
            self._at = self._after.get(tuple(self._text[-size:]))
            if self._at is not None:
                self._agreeing = size
                return

    def next_bucket(self) -> int | None:
        """See `Proposer`."""
        return min(self._agreeing, LONGEST_NGRAM) - 1 if self._agreeing else None

    def propose(self, _choose: Choose) -> DraftedToken | None:
        """See `Proposer`. Drafted tokens may be copied, too: a text that repeats itself is likely to go on so."""
        bucket = self.next_bucket()
        if self._at is None or bucket is None:
            return None
        token = self._text[self._at]
        self._text.append(token)
        self._at, self._agreeing = self._at + 1, self._agreeing + 1
        return DraftedToken(token, bucket)
