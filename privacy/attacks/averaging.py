"""Averaging: an example that comes again and again under fresh noise comes once with less, by the root of the times.

Rows of one length are of one example where nothing tells them apart: where they lie no further from each other, on the
whole and at any position, than public texts do that are sent twice. Noise that an example has in every pass does not
average out; rows that are the same to the bit count once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median_low
from typing import ClassVar

import torch
from torch import Tensor

from isthmus.privacy.attacks.attack import Guess, Knowledge, KnownDefence, Row, rows
from isthmus.privacy.attacks.vocabulary_matching import VocabularyMatching
from isthmus.privacy.attacks.wire_noise import WireNoise
from isthmus.privacy.recording.traffic import Forward, Traffic
from isthmus.protocol.tensor_codecs import Role, decode, encode


@dataclass
class _Example:
    """Rows of one example: what came, and the numbers of the rows."""

    sent: list[Tensor]
    positions: Tensor
    numbers: list[int] = field(default_factory=list)


class AveragedMatching:
    """Vocabulary matching of the mean of what came of each example."""

    name: ClassVar[str] = "averaged_matching"
    sees: ClassVar[str] = "activations of several passes"
    knows: ClassVar[str] = VocabularyMatching.knows

    def prepare(self, knowledge: Knowledge) -> None:
        """Learn from public texts how far apart two passes of one text lie. Matching learns when the passes are known.

        Private fronts are taken for what they are in all passes.
        """
        self._knowledge = knowledge
        texts = knowledge.public_texts
        again = [knowledge.sent(text.tokens, text.exact, len(texts) + number) for number, text in enumerate(texts)]
        exact = torch.cat([text.exact[1:] for text in texts])
        apart = torch.cat([(text.sent - other)[1:] for text, other in zip(texts, again, strict=True)])
        self._noise = WireNoise(apart, exact, correlated=len(apart) > 2 * apart.shape[1])
        pairs = [self._apart(text.sent, other) for text, other in zip(texts, again, strict=True)]
        self._widest = torch.stack(pairs).amax(0)

    def run(self, traffic: Traffic) -> Guess:
        """See `Attack`."""
        found = list(rows(traffic, self._knowledge.front))
        examples = self._examples(found)
        matching, times = VocabularyMatching(), median_low([len(example.sent) for example in examples])
        matching.prepare(replace(self._knowledge, codec="fp32", defence=_Repeated(self._knowledge, times)))
        means = [torch.stack(example.sent).mean(0)[None] for example in examples]
        forwards = [
            Forward(call, 0, mean, None, example.positions[None], "fp32", None, False)
            for call, (mean, example) in enumerate(zip(means, examples, strict=True))
        ]
        guess = matching.run(replace(traffic, forwards=tuple(forwards)))
        tokens = [torch.empty(0)] * len(found)
        for example, guessed in zip(examples, guess.tokens, strict=True):
            for number in example.numbers:
                tokens[number] = found[number].spread(guessed)
        return Guess(tuple(tokens), guess.listed)

    def _examples(self, found: Sequence[Row]) -> list[_Example]:
        examples: list[_Example] = []
        for number, row in enumerate(found):
            alike = (each for each in examples if len(each.positions) == len(row.hidden) and self._same(each, row))
            example = next(alike, None)
            if example is None:
                examples.append(example := _Example([], row.positions))
            if not any(torch.equal(row.hidden, other) for other in example.sent):
                example.sent.append(row.hidden)
            example.numbers.append(number)
        return examples

    def _same(self, example: _Example, row: Row) -> bool:
        return bool((self._apart(example.sent[0], row.hidden) <= self._widest).all())

    def _apart(self, one: Tensor, other: Tensor) -> Tensor:
        """How far two rows `[n, h]` lie apart on the whole, and where they do most, `[2]`.

        The first position is left out: its norm is another, and the noise of some codecs with it.
        """
        distances = self._noise.distances(one[1:], other[1:])
        return torch.stack([distances.square().mean(), distances.amax()])


class _Repeated(KnownDefence):
    """The mean of what comes of several passes through defence and codec."""

    def __init__(self, knowledge: Knowledge, times: int) -> None:
        self._known, self._codec, self._times = knowledge.defence or KnownDefence(), knowledge.codec, times
        self.on_embeddings = self._known.on_embeddings

    def embedded(self, embedded: Tensor) -> Tensor:
        return self._known.embedded(embedded)

    def send(self, hidden: Tensor) -> Tensor:
        sent = [decode(encode(self._known.send(hidden), self._codec, Role.ACTIVATION)) for _ in range(self._times)]
        return torch.stack(sent).mean(0)

    def expect(self, hidden: Tensor) -> Tensor:
        return self._known.expect(hidden)
