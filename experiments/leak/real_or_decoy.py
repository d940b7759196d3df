"""Telling real texts from decoys, once all have been read.

The attacker knows how decoys are written, and learns from public texts and decoys of its own: a ridge regression of
what the frozen model makes of a text, which is the mean of its last hidden states, the last one, and the loss a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from isthmus.privacy.measures.bootstrap import Interval
from isthmus.privacy.measures.membership import membership_auc, membership_interval

_PENALTIES = tuple(10.0**power for power in range(-1, 6))


class RealOrDecoy:
    """What tells the two apart.

    Args:
        model: The whole frozen model.
        real: Tokens `[n]` of public texts.
        decoys: Tokens `[n]` of decoys that the attacker has written.
    """

    def __init__(self, model: Any, real: Sequence[Tensor], decoys: Sequence[Tensor]) -> None:
        self._model = model
        learned = self._features([*real, *decoys])
        self._mean, self._spread = learned.mean(0), learned.std(0).clamp_min(1e-9)
        self._learned = self._scaled(learned)
        sides = torch.tensor([1.0] * len(real) + [-1.0] * len(decoys), dtype=torch.float64)
        values, vectors = torch.linalg.eigh(self._learned @ self._learned.T)

        def fitted(penalty: float) -> tuple[float, Tensor]:
            """The error of each text by a regression without it, and the weights of the texts."""
            shrunk = 1 / (values.clamp_min(0) + penalty)
            weights = vectors @ (shrunk * (vectors.T @ sides))
            return float((weights / (vectors.square() @ shrunk)).square().mean()), weights

        _, self._weights = min((fitted(penalty) for penalty in _PENALTIES), key=lambda each: each[0])

    def told(self, texts: Sequence[Tensor], is_real: Tensor) -> Interval:
        """The chance that a real text looks more real than a decoy, with its interval; 0.5 tells nothing.

        Args:
            texts: Tokens `[n]` as they were guessed; -1 where nothing is.
            is_real: `[texts]`, bool.
        """
        scores = self._scaled(self._features([tokens[tokens >= 0] for tokens in texts])) @ self._learned.T
        return told_by(scores @ self._weights, is_real)

    def _scaled(self, features: Tensor) -> Tensor:
        return (features - self._mean) / self._spread

    @torch.no_grad()
    def _features(self, texts: Sequence[Tensor]) -> Tensor:
        """`[texts, 2 * h + 1]` fp64, of texts of two tokens or more; zeros of shorter ones."""
        rows = []
        for tokens in texts:
            if len(tokens) < 2:
                rows.append(torch.zeros(2 * self._model.config.hidden_size + 1))
                continue
            found = self._model(input_ids=tokens[None], use_cache=False, output_hidden_states=True)
            hidden, loss = found.hidden_states[-1][0], cross_entropy(found.logits[0, :-1], tokens[1:])
            rows.append(torch.cat([hidden[1:].mean(0), hidden[-1], loss[None]]))  # without the attention sink
        return torch.stack(rows).double()


def told_by(scores: Tensor, is_real: Tensor) -> Interval:
    """The chance that a real text has a higher score than a decoy, `[texts]` both."""
    return membership_interval(membership_auc, scores[is_real], scores[~is_real])
