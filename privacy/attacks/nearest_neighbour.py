"""Nearest neighbour: the token of the public hidden state that lies nearest."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from isthmus.privacy.attacks.attack import Guess, Knowledge, rows
from isthmus.privacy.recording.traffic import Traffic


class NearestNeighbour:
    """Looks each hidden state up among those of public texts, by the cosine of their standardised channels.

    The weakest attack here: it names no token that the public texts lack.
    """

    name: ClassVar[str] = "nearest_neighbour"
    sees: ClassVar[str] = "activations"
    knows: ClassVar[str] = "the front, public texts"

    def prepare(self, knowledge: Knowledge) -> None:
        """Run the public texts through the front."""
        texts = knowledge.public_texts
        states = torch.cat([text.sent for text in texts])
        later = torch.cat([text.sent[1:] for text in texts])
        self._front = knowledge.front
        self._mean, self._spread = later.mean(0), later.std(0).clamp_min(1e-9)
        self._states, self._tokens = self._scaled(states), torch.cat([text.tokens for text in texts])

    def run(self, traffic: Traffic) -> Guess:
        """See `Attack`."""
        return Guess(
            tuple(
                row.spread(self._tokens[(self._scaled(row.hidden) @ self._states.T).argmax(1)])
                for row in rows(traffic, self._front)
            )
        )

    def _scaled(self, hidden: Tensor) -> Tensor:
        return normalize((hidden - self._mean) / self._spread, dim=1)
