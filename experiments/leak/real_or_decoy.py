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

from isthmus.privacy.measures.bootstrap import Interval, mean_interval

_PENALTIES = tuple(10.0**power for power in range(-1, 6))


class RealOrDecoy:
    """A ridge classifier of real texts against decoys.

    Args:
        model: The whole frozen model.
        real: Tokens `[n]` of public texts.
        decoys: Tokens `[n]` of decoys that the attacker has written.

    Attributes:
        penalty: The one with the least leave-one-out error.
    """

    def __init__(self, model: Any, real: Sequence[Tensor], decoys: Sequence[Tensor]) -> None:
        self._model = model
        learned = self._features([*real, *decoys])
        self._mean, self._std = learned.mean(0), learned.std(0).clamp_min(1e-9)
        self._learned = self._scaled(learned)
        sides = torch.tensor([1.0] * len(real) + [-1.0] * len(decoys), dtype=torch.float64)
        sides -= sides.mean()
        values, vectors = torch.linalg.eigh(self._learned @ self._learned.T)

        def dual_weights(penalty: float) -> tuple[Tensor, Tensor]:
            """The texts' weights, and each one's leave-one-out error."""
            shrunk = 1 / (values.clamp_min(0) + penalty)
            found = vectors @ (shrunk * (vectors.T @ sides))
            intercept = 1 / (len(sides) * penalty)  # its part of the diagonal: features and sides are centred
            return found, found / (vectors.square() @ shrunk - intercept)

        self.penalty = min(_PENALTIES, key=lambda penalty: float(dual_weights(penalty)[1].square().mean()))
        self._weights, _ = dual_weights(self.penalty)

    def scores(self, texts: Sequence[Tensor]) -> Tensor:
        """How real each text `[n]` looks, `[texts]`; its tokens are guesses, -1 where nothing is."""
        features = self._scaled(self._features([tokens[tokens >= 0] for tokens in texts]))
        return features @ self._learned.T @ self._weights

    def _scaled(self, features: Tensor) -> Tensor:
        return (features - self._mean) / self._std

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


def share_picked(scores: Tensor, is_real: Tensor, text_numbers: Sequence[int]) -> Interval:
    """How often the real one has the highest score of a text and its decoys; by chance, once in as many as they are.

    Args:
        scores, is_real: Of each row, `[rows]`.
        text_numbers: Of each row; of each number one row is real.
    """
    hits = []
    for number in dict.fromkeys(text_numbers):
        here = torch.tensor([each == number for each in text_numbers])
        best = scores[here] == scores[here].max()
        hits.append(float(is_real[here][best].double().sum() / best.sum()))
    return mean_interval(torch.tensor(hits))
