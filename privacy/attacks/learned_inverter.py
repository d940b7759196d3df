"""A learned inverter: one transformer layer, trained on the hidden states of public texts at the cut."""

from __future__ import annotations

from typing import ClassVar

from isthmus.privacy.attacks.attack import Guess, Knowledge, rows
from isthmus.privacy.attacks.coarse_maps import inverter_of
from isthmus.privacy.recording.traffic import Traffic


class LearnedInverter:
    """Inverts a whole sequence at once. Needs no forward of the front once it is trained."""

    name: ClassVar[str] = "learned_inverter"
    sees: ClassVar[str] = "activations"
    knows: ClassVar[str] = "the front, public texts"

    def prepare(self, knowledge: Knowledge) -> None:
        """Train on public texts, as they come out of the defence and the codec."""
        self._front, self._map = knowledge.front, inverter_of(knowledge)

    def run(self, traffic: Traffic) -> Guess:
        """See `Attack`."""
        return Guess(tuple(row.spread(self._map.scores(row.hidden).argmax(1)) for row in rows(traffic, self._front)))
