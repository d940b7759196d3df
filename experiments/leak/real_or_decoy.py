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
    """What tells the two apart.

    Args:
        model: The whole frozen model.
        real: Tokens `[n]` of public texts.
        decoys: Tokens `[n]` of decoys that the attacker has written.

    Attributes:
        penalty: Of the regression: that with the least error on texts that it leaves out.
    """

    def __init__(self, model: Any, real: Sequence[Tensor], decoys: Sequence[Tensor]) -> None:
        self._model = model
        learned = self._features([*real, *decoys])
        self._mean, self._spread = learned.mean(0), learned.std(0).clamp_min(1e-9)
        self._learned = self._scaled(learned)
        sides = torch.tensor([1.0] * len(real) + [-1.0] * len(decoys), dtype=torch.float64)
        values, vectors = torch.linalg.eigh(self._learned @ self._learned.T)
        # Features without their mean leave the direction of all texts alike out, which is the regression's intercept.
        values, vectors = values[1:], vectors[:, 1:]

        def weights(penalty: float) -> tuple[Tensor, Tensor]:
            """The texts' weights, and each one's error by a regression without it."""
            shrunk = 1 / (values.clamp_min(0) + penalty)
            found = vectors @ (shrunk * (vectors.T @ sides))
            return found, found / (vectors.square() @ shrunk)

        self.penalty = min(_PENALTIES, key=lambda penalty: float(weights(penalty)[1].square().mean()))
        self._weights, _ = weights(self.penalty)

    def scores(self, texts: Sequence[Tensor]) -> Tensor:
        """How real each text `[n]` looks, `[texts]`; its tokens are guesses, -1 where nothing is."""
        features = self._scaled(self._features([tokens[tokens >= 0] for tokens in texts]))
        return features @ self._learned.T @ self._weights

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


def found_among_decoys(scores: Tensor, is_real: Tensor, places: Sequence[int]) -> Interval:
    """How often the text that looks most real of those at a place is the real one.

    Guessing is right once in as many as there are.

    Args:
        scores, is_real: Of each text, `[texts]`.
        places: Of each text; one at each place is real.
    """
    hits = []
    for place in dict.fromkeys(places):
        here = torch.tensor([each == place for each in places])
        best = scores[here] == scores[here].max()
        hits.append(float(is_real[here][best].double().sum() / best.sum()))
    return mean_interval(torch.tensor(hits))
