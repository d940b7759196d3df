"""Ridge inversion: a linear map from hidden state to token embedding, and the nearest row of the embedding."""

from __future__ import annotations

from typing import ClassVar

from isthmus.privacy.attacks.attack import Guess, Knowledge, rows
from isthmus.privacy.attacks.coarse_maps import ridge_of
from isthmus.privacy.recording.traffic import Traffic


class RidgeInversion:
    """Inverts each hidden state on its own, with a map that takes seconds to learn."""

    name: ClassVar[str] = "ridge_inversion"
    sees: ClassVar[str] = "activations"
    knows: ClassVar[str] = "the front, public texts"

    def prepare(self, knowledge: Knowledge) -> None:
        """Fit the map to public texts."""
        self._front, self._map = knowledge.front, ridge_of(knowledge)

    def run(self, traffic: Traffic) -> Guess:
        """See `Attack`."""
        return Guess(tuple(row.spread(self._map.scores(row.hidden).argmax(1)) for row in rows(traffic, self._front)))
