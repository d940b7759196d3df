"""From a draft to transformers' assisted generation, which verifies it: greedily by comparing, or by rejection sampling
(Leviathan et al. 2023, arXiv:2211.17192, algorithm 1)."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator

from isthmus.backbone.decoding.few_rows import few_rows_at_the_head
from isthmus.backbone.split.cached_generation import CachedGeneration, DraftedText
from isthmus.common.errors import UnsupportedCallError
from isthmus.edge.drafts.length_rule import LengthRule, VerifiedRound


@dataclass(slots=True)
class DraftStatistics:
    """What a draft has done so far, over all texts.

    Attributes:
        rounds: Calls of the model in which there could have been a draft.
        drafted: Tokens that were drafted.
        judged: Those of them that the cloud has decided about: all up to the first that was rejected.
        accepted: Those of them that stand in the text.
        tokens: By which the texts grew in these rounds.
        draft_seconds: Spent on drafting, what the draft took in of the text first with it.
    """

    rounds: int = 0
    drafted: int = 0
    judged: int = 0
    accepted: int = 0
    tokens: int = 0
    draft_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """The token that a draft's logits lead to.

    Attributes:
        token: Its number.
        confidence: The draft's probability of it, in [0, 1].
        logits: What it was chosen by, `[1, V]`: the draft's, processed as the model's are.
    """

    token: int
    confidence: float
    logits: Tensor


@dataclass(frozen=True, slots=True)
class DraftedToken:
    """One token of a draft.

    Attributes:
        token: Its number.
        bucket: How sure the draft is; see `isthmus.edge.drafts.calibration`.
        logits: As in `Choice`; None where it follows from the text alone.
    """

    token: int
    bucket: int
    logits: Tensor | None = None


Choose = Callable[[Tensor], Choice]
"""Chooses the next token by a draft's logits `[1, V]` for it."""


class Proposer(Protocol):
    """Drafts the continuation of one text."""

    def follow(self, text: Sequence[int]) -> None:
        """A round begins; these are the tokens so far, without padding. They begin with those of the round before."""

    def next_bucket(self) -> int | None:
        """The bucket of the next token; None where that shows only once it is drafted."""

    def propose(self, choose: Choose) -> DraftedToken | None:
        """The next token of this round; None for no more."""


class Draft(ABC):
    """A way to draft. It learns over all texts that it drafts for, one at a time.

    Args:
        rule: How long a draft is.
        clock: Returns seconds.

    Attributes:
        statistics: What it has done so far.
    """

    def __init__(self, rule: LengthRule, clock: Callable[[], float] = time.perf_counter) -> None:
        self.rule, self.clock = rule, clock
        self.statistics = DraftStatistics()

    def begin(self, text: DraftedText) -> Candidates:
        """See `isthmus.backbone.split.cached_generation.DraftSource`."""
        return Candidates(self, text, self.proposer())

    @abstractmethod
    def proposer(self) -> Proposer:
        """What drafts for a text that begins."""

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        """A copied model has the same draft."""
        return self

    def check_fits(self, model: Any) -> None:  # noqa: B027  # a draft by the text alone fits every model
        """Make sure that it can draft for a model.

        Raises:
            UnsupportedCallError: It cannot.
        """


class Candidates(CandidateGenerator):  # type: ignore[misc]  # transformers has no types
    """transformers' candidate generator over a draft, for one text.

    Args:
        draft: Whose rule and statistics it uses.
        text: The text.
        proposer: Drafts the tokens.
    """

    def __init__(self, draft: Draft, text: DraftedText, proposer: Proposer) -> None:
        self._draft, self._text, self._proposer = draft, text, proposer
        self._ids = text.prompt  # with what this round has drafted
        self._drafted: list[DraftedToken] = []
        self._length = 0
        self._drafting = 0.0
        self._asked_at: float | None = None
        self._prompt_is_done = False

    def get_candidates(self, input_ids: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        """The text with a draft behind it, `[1, n + k]`, and the draft's processed logits `[1, k, V]`.

        The logits are None for a greedy text, and where each drafted token follows from the text alone.
        """
        rule, clock = self._draft.rule, self._draft.clock
        began_at = clock()
        self._ids, self._length, self._drafted = input_ids, input_ids.shape[1], []
        room = self._text.longest - self._length - 1  # the round gives one more token than the draft has
        self._proposer.follow(self._without_padding(input_ids))
        while len(self._drafted) < room and rule.should_draft(self._buckets(), self._proposer.next_bucket()):
            token_at = clock()
            drafted = self._proposer.propose(self._choose)
            if drafted is None:
                break
            rule.token_drafted(clock() - token_at)
            self._drafted.append(drafted)
            self._ids = torch.cat([self._ids, self._ids.new_tensor([[drafted.token]])], dim=1)
            if drafted.token in self._text.ends:
                break
        self._asked_at = clock()
        self._drafting = self._asked_at - began_at
        logits = [each.logits for each in self._drafted if each.logits is not None]
        return self._ids, torch.stack(logits, dim=1) if logits and self._text.sampling else None

    def update_candidate_strategy(self, input_ids: Tensor, _scores: Tensor, _num_matches: int) -> None:
        """The round is verified: `input_ids`, `[1, n]`, is the text now."""
        with_prompt, self._prompt_is_done = not self._prompt_is_done, True
        if self._asked_at is None:  # a round that nobody asked for a draft
            return
        verifying, self._asked_at = self._draft.clock() - self._asked_at, None
        new = input_ids[0, self._length :].tolist()
        # transformers' own count leaves out a drafted token that ends the text.
        accepted = 0
        while accepted < min(len(self._drafted), len(new)) and self._drafted[accepted].token == new[accepted]:
            accepted += 1
        verified = VerifiedRound(
            self._buckets(), accepted, len(new), self._drafting, None if with_prompt else verifying
        )
        self._draft.rule.round_over(verified)
        statistics = self._draft.statistics
        statistics.rounds += 1
        statistics.drafted += len(self._drafted)
        statistics.judged += verified.judged
        statistics.accepted += accepted
        statistics.tokens += len(new)
        statistics.draft_seconds += self._drafting

    def _buckets(self) -> list[int]:
        return [each.bucket for each in self._drafted]

    def _without_padding(self, input_ids: Tensor) -> list[int]:
        mask, prompt = self._text.attention_mask, self._text.prompt
        tokens: list[int] = input_ids[0].tolist()
        if mask is None or mask.shape != prompt.shape:
            return tokens
        seen = mask[0].tolist()
        return [token for token, is_seen in zip(tokens, seen, strict=False) if is_seen] + tokens[len(seen) :]

    def _choose(self, logits: Tensor) -> Choice:
        processed: Tensor = self._text.processors(self._ids, logits.to(self._ids.device, torch.float32, copy=True))
        chances = processed.softmax(dim=-1)
        chosen = torch.multinomial(chances, 1) if self._text.sampling else chances.argmax(dim=-1, keepdim=True)
        return Choice(int(chosen), float(chances[0, chosen[0]]), processed)


@contextmanager
def drafting(model: Any, draft: Draft) -> Iterator[Draft]:
    """Let a split model generate with a draft inside, one text at a time.

    A greedy text is the one without a draft, up to rounding: floating point products depend on the number of rows, so
    where two tokens are nearly as likely the other one may be chosen, and the text goes on from there. In bf16 that is
    frequent; if decoding is exact (see `isthmus.edge.generation.exact`) it never happens. A sampled text has the
    distribution of one without a draft.

    Inside, the model's output layer multiplies 2 to 8 rows in another order for whoever calls it (see
    `isthmus.backbone.decoding.few_rows`). Logits processors have to be functions of the tokens and the logits, and
    stopping criteria are asked after each round.

    Args:
        model: The split model, or a PEFT model around it.
        draft: What drafts.

    Raises:
        UnsupportedCallError: It is no split model, or the draft does not fit it.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, CachedGeneration):
        raise UnsupportedCallError(f"a {type(base).__name__} is no split model, and needs no drafts of this kind")
    draft.check_fits(base)
    before, base.isthmus_draft = base.isthmus_draft, draft
    try:
        with few_rows_at_the_head(base):
            yield draft
    finally:
        base.isthmus_draft = before
