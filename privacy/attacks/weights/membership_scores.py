"""Whether a text was trained on, from an adapter that its owner has given away.

Whoever has the adapter has the tuned model. A text that it was trained on has a lower loss (Yeom et al. 2018). A text
may have a low loss because it is easy, so the calibrated score subtracts its loss under a model that has not seen it
(Watson et al. 2022): the base model, or one that was tuned on other texts of the kind.

Scores are for `isthmus.privacy.measures.membership`: a higher one speaks for a member.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from isthmus.common.errors import DataError


class Candidate(NamedTuple):
    """A text that may have been trained on.

    Attributes:
        tokens: `[n]`.
        start: The first token that would be a label, 1 at least: where a completion begins.
    """

    tokens: Tensor
    start: int = 1


class LossMembership:
    """The loss of a text, negative."""

    name: ClassVar[str] = "membership-loss"
    sees: ClassVar[str] = "the returned adapter"
    knows: ClassVar[str] = "the base weights, and candidate texts"

    def __init__(self, tuned: Any) -> None:
        """Attack `tuned`, a transformers causal LM that carries the adapter."""
        self._tuned = tuned

    def scores(self, candidates: Sequence[Candidate]) -> Tensor:
        """The score of each candidate, `[candidates]`, in nats a token.

        Raises:
            DataError: A candidate has no label.
        """
        return -_losses(self._tuned, candidates)


class CalibratedMembership(LossMembership):
    """How much lower the loss of a text is than a reference model's."""

    name: ClassVar[str] = "membership-calibrated"
    knows: ClassVar[str] = "the base weights, candidate texts, and perhaps other texts of the kind to tune them on"

    def __init__(self, tuned: Any, reference: Any) -> None:
        """Attack `tuned` with `reference`: the base model, or it tuned on other texts; both transformers causal LMs."""
        super().__init__(tuned)
        self._reference = reference

    def scores(self, candidates: Sequence[Candidate]) -> Tensor:
        """See `LossMembership`."""
        return _losses(self._reference, candidates) + super().scores(candidates)


@torch.no_grad()
def _losses(model: Any, candidates: Sequence[Candidate]) -> Tensor:
    losses = []
    for tokens, start in candidates:
        if not 1 <= start < len(tokens):
            raise DataError(f"a text of {len(tokens)} tokens whose labels begin at {start} has none: leave it out")
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, start - 1 : -1]
        losses.append(cross_entropy(logits.float(), tokens[start:]))
    return torch.stack(losses)
