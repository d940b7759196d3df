"""Telling real texts from decoys, once all have been read: by how likely the frozen model finds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from isthmus.privacy.measures.bootstrap import Interval
from isthmus.privacy.measures.membership import membership_auc, membership_interval

_PUBLIC = 100


def real_or_decoy(
    model: Any, eos: int | None, texts: Sequence[Tensor], is_real: Tensor, public: Sequence[Tensor]
) -> Interval:
    """The chance that a real text looks more real than a decoy, with its interval; 0.5 tells nothing.

    A text looks real that has a loss a token near that of public texts. The end token counts, so that a text that was
    cut off shows.

    Args:
        model: The whole frozen model.
        eos: Its end token; None where it has none.
        texts: Tokens `[n]` as they were guessed; -1 where nothing is.
        is_real: `[texts]`, bool.
        public: Tokens of public texts.
    """
    usual = torch.tensor([_loss(model, eos, tokens) for tokens in public[:_PUBLIC]])
    losses = torch.tensor([_loss(model, eos, tokens[tokens >= 0]) for tokens in texts])
    scores = -((losses - usual.mean()) / usual.std()).abs()
    return membership_interval(membership_auc, scores[is_real], scores[~is_real])


@torch.no_grad()
def _loss(model: Any, eos: int | None, tokens: Tensor) -> float:
    """Nats for a token, of a text `[n]` that ends."""
    if eos is not None and (not len(tokens) or tokens[-1] != eos):
        tokens = torch.cat([tokens, torch.tensor([eos])])
    if len(tokens) < 2:
        return 0.0
    logits = model(input_ids=tokens[None], use_cache=False).logits[0]
    return float(cross_entropy(logits[:-1], tokens[1:]))
