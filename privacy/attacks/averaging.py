"""Averaging: an example that comes again and again under fresh noise comes once with less, by the root of the times.

Which row is of which example is told by the order in which rows come: that of held-out texts is the same in each
evaluation, and that of training follows from settings that are no secret. Noise that an example has in every pass does
not average out; a pass that is the same to the bit as the first, in all rows, does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from isthmus.privacy.attacks.attack import Guess, Knowledge
from isthmus.privacy.attacks.vocabulary_matching import VocabularyMatching
from isthmus.privacy.recording.traffic import Traffic

_APART = 1 << 20
"""Between the numbers of two passes of one text: more than there are texts, and than there are tokens."""


def mean_of(passes: Iterable[Traffic]) -> tuple[Traffic, int]:
    """The mean of what came of the same rows, in the same order, in several passes, and how many of these counted.

    Takes one pass at a time, so its memory is that of two, however many there are.
    """
    first, sums, counted = None, list[Tensor](), 1
    for each in passes:
        if first is None:
            first, sums = each, [forward.hidden.double() for forward in each.forwards]
        elif any(not torch.equal(a.hidden, b.hidden) for a, b in zip(first.forwards, each.forwards, strict=True)):
            counted += 1
            sums = [total + forward.hidden for total, forward in zip(sums, each.forwards, strict=True)]
    if first is None:
        raise ValueError("no pass to average")
    means = [(total / counted).float() for total in sums]
    forwards = [replace(forward, hidden=mean) for forward, mean in zip(first.forwards, means, strict=True)]
    return replace(first, forwards=tuple(forwards)), counted


class AveragedMatching:
    """Vocabulary matching of a mean that `mean_of` has made.

    Args:
        times: How many passes counted.
    """

    name: ClassVar[str] = "averaged_matching"
    sees: ClassVar[str] = "activations of several passes"
    knows: ClassVar[str] = VocabularyMatching.knows

    def __init__(self, times: int) -> None:
        self._times, self._matching = times, VocabularyMatching()

    def prepare(self, knowledge: Knowledge) -> None:
        """Learn from the means of as many passes of public texts."""
        known = {each.name: getattr(knowledge, each.name) for each in fields(knowledge)}
        self._matching.prepare(_InSeveralPasses(**known, times=self._times))

    def run(self, traffic: Traffic) -> Guess:
        """See `Attack`."""
        return self._matching.run(traffic)


@dataclass(frozen=True, eq=False)
class _InSeveralPasses(Knowledge):
    """What an attacker has of its own texts where it has the mean of several passes.

    Attributes:
        times: How many.
    """

    times: int = 1

    def sent(self, tokens: Tensor, exact: Tensor, number: int) -> Tensor:
        return self._mean(lambda turn: super(_InSeveralPasses, self).sent(tokens, exact, number + turn * _APART))

    def sent_alone(self, tokens: Tensor, number: int = 0) -> Tensor:
        return self._mean(lambda turn: super(_InSeveralPasses, self).sent_alone(tokens, number + turn * _APART))

    def _mean(self, sent: Callable[[int], Tensor]) -> Tensor:
        total = sent(0).double()
        for turn in range(1, self.times):
            total += sent(turn)
        return (total / self.times).float()
