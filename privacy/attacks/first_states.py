"""The hidden states of every token at the first position, where no token before it matters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from isthmus.privacy.attacks.attack import Knowledge
from isthmus.privacy.attacks.coarse_maps import first_tokens
from isthmus.privacy.attacks.wire_noise import WireNoise

_FIRST, _CHUNK = 256, 1024


class FirstStates:
    """Finds first tokens. Likely ones come first; what has been computed serves all sequences.

    Args:
        knowledge: What the attacker knows.
        slack: The threshold, over the largest distance of a public text's own first token.
    """

    def __init__(self, knowledge: Knowledge, slack: float) -> None:
        self._knowledge = knowledge
        self._order = first_tokens(knowledge)
        self._computed: dict[int, list[Tensor]] = {}
        likely, expected = next(self._chunks(torch.tensor(0)))
        texts = knowledge.public_texts
        sent = torch.stack([text.sent[0] for text in texts])
        noise = sent - knowledge.expect(torch.stack([text.exact[0] for text in texts]))
        drift = expected - expected.mean(0) if knowledge.private_front else None
        if knowledge.known:
            tokens = torch.stack([tokens[0] for tokens, _ in knowledge.known])
            own = torch.cat([knowledge.front.states(token[None]) for token in tokens])
            drift = torch.stack([hidden[0] for _, hidden in knowledge.known]) - knowledge.expect(own)
        self._noise = WireNoise(noise, expected, correlated=False, drift=drift)
        distances = torch.stack([self._noise.distances(expected, each) for each in sent])  # [texts, likely]
        right = torch.stack([text.tokens[0] for text in texts])[:, None] == likely
        threshold = slack * float(distances[right].max())
        separates = not knowledge.private_front and float(distances[~right].min()) > threshold
        self._threshold = threshold if separates else 0.0

    def find(self, arrived: Tensor, position: Tensor) -> tuple[Tensor, bool]:
        """The token `[]` whose state lies nearest to `[h]`, and whether it explains it."""
        best, token = float("inf"), self._order[0]
        for tokens, expected in self._chunks(position):
            distances = self._noise.distances(expected, arrived)
            if (nearest := float(distances.min())) < best:
                best, token = nearest, tokens[distances.argmin()]
            if best <= self._threshold:
                break
        return token, best <= self._threshold or not self._threshold

    def _chunks(self, position: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The vocabulary `[m]` with what is expected of each token at a position, `[m, h]`, piece by piece."""
        computed = self._computed.setdefault(int(position), [])
        front = self._knowledge.front
        pieces = [self._order[:_FIRST], *torch.split(self._order[_FIRST:], _CHUNK)]
        for number, tokens in enumerate(pieces):
            if number == len(computed):
                states = front.candidates(front.begin(), tokens, position)
                computed.append(self._knowledge.expect(states))
            yield tokens, computed[number]
