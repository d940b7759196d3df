"""Vocabulary matching: token by token, the candidate whose hidden state is what came.

A hidden state is a function of its own token and of those before it. Once those are found, the attacker computes it for
candidates and takes the one that lies nearest, by the noise of defence and codec (`wire_noise`). A coarse map names the
candidates, the likeliest first, in lists that grow until one explains what came: until its distance is below a
threshold, which is learned from the distances of public texts' own tokens, and of others, after the same defence and
codec.

Where that threshold tells the right token from all others, whole runs of the coarse map's first choices are checked in
one forward, and what they get wrong goes to the lists. Where it does not, the first list is as long as is needed to
hold the right token of nearly all public texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from isthmus.common.progress import watched
from isthmus.privacy.attacks.attack import Guess, Knowledge, Row, rows
from isthmus.privacy.attacks.coarse_maps import CoarseMap, held_out, inverter_of, ranks, ridge_of
from isthmus.privacy.attacks.first_states import FirstStates
from isthmus.privacy.attacks.front import Prefix
from isthmus.privacy.attacks.private_front import fit_front, held_out_known
from isthmus.privacy.attacks.wire_noise import WireNoise
from isthmus.privacy.recording.traffic import Traffic

_LISTS = (8, 32, 128, 512, 2048)
"""Lengths of the lists; then the whole vocabulary in pieces of the last."""

_PRIVATE_LIST = 128
_SAMPLE = 12  # rows whose guesses a private front is fitted to
_RUNS = (4, 32)
"""Tokens of a run that is checked at once, at least and at most; each that holds is followed by one twice as long."""

_SLACK = 1.25
_ENOUGH = 0.995
"""Share of public tokens that the first list has to hold where the threshold does not tell."""

_CALIBRATION = 256
"""Public tokens that the threshold is learned from."""


class VocabularyMatching:
    """The strongest attack on tokens: exact where no noise is added, at any depth."""

    name: ClassVar[str] = "vocabulary_matching"
    sees: ClassVar[str] = "activations"
    knows: ClassVar[str] = "the front, public texts; with a private front the base weights, and known texts if any"

    def prepare(self, knowledge: Knowledge) -> None:
        """Learn a coarse map, the noise, and the threshold from public texts.

        With known texts the front has been fitted to some of them (`private_front.fit_front`), and the others tell how
        far off it still is. With a private front and no known text nothing tells: every list has one length.
        """
        self._knowledge, self._front = knowledge, knowledge.front
        texts = knowledge.public_texts
        exact = torch.cat([text.exact[1:] for text in texts])
        noise = torch.cat([text.sent[1:] - knowledge.expect(text.exact)[1:] for text in texts])
        judged = held_out_known(knowledge)
        drift = exact - exact.mean(0) if knowledge.private_front else None
        if judged:
            drift = torch.cat([hidden - knowledge.expect(self._front.states(tokens)) for tokens, hidden in judged])
        self._noise = WireNoise(noise, exact, correlated=len(noise) > 2 * noise.shape[1], drift=drift)
        self._first = FirstStates(knowledge, _SLACK)
        self._map, self._ranks = _coarse_map(knowledge)
        if knowledge.private_front and not judged:
            self._threshold, self._tells, self._shortest = float("inf"), False, _PRIVATE_LIST
            return
        self._calibrate(judged or [(text.tokens, text.sent) for text in held_out(knowledge)])

    def run(self, traffic: Traffic) -> Guess:
        """See `Attack`. A private front is fitted to what is guessed of some rows, before all are read."""
        found = list(rows(traffic, self._front))
        return (self._fitted(found) if self._knowledge.private_front else self)._guess(found)

    def _fitted(self, found: Sequence[Row]) -> VocabularyMatching:
        """The attack with a front that is fitted to guesses as if they were known, where there are enough."""
        plain = [row for row in found if torch.equal(row.positions, torch.arange(len(row.hidden)))]
        longest = sorted(plain, key=lambda row: -len(row.hidden))[:_SAMPLE]
        read = self._read_all([row for row in longest if len(row.hidden) > 1])
        guessed = [(tokens, row.hidden) for row, tokens, _ in read]
        known = (*self._knowledge.known, *guessed)
        if len(known) < 2:
            return self
        fitted = VocabularyMatching()
        fitted.prepare(fit_front(replace(self._knowledge, known=known)))
        return fitted

    def _guess(self, found: Sequence[Row]) -> Guess:
        guesses, listed = [], []
        for row, tokens, credit in self._read_all(found):
            guesses.append(row.spread(tokens))
            listed.append(torch.tensor(credit))
        return Guess(tuple(guesses), tuple(listed))

    def _calibrate(self, texts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Learn from texts `[n]` and what came of them `[n, h]` how near the right token lies, and how near others."""
        right, others = [], []
        for tokens, arrived in watched(self._knowledge.progress, "learning how near matches lie", texts):
            scores, prefix = self._map.scores(arrived), self._front.begin()
            positions = torch.arange(len(tokens))
            self._front.extend(prefix, tokens[:1], positions[:1])
            for place in range(1, len(tokens)):
                likely = scores[place].topk(min(_LISTS[1], scores.shape[1])).indices
                wrong = likely[likely != tokens[place]]
                tried = torch.cat([tokens[place, None], wrong])
                distances = self._distances(prefix, tried, positions[place], arrived[place])
                right.append(float(distances[0]))
                others.append(float(distances[1:].min()))
                self._front.extend(prefix, tokens[place, None], positions[place, None])
            if len(right) >= _CALIBRATION:
                break
        self._threshold = _SLACK * max(right)
        self._tells = min(others) > self._threshold
        if self._tells:  # half-way, on a scale of factors: rounding differs by token and by processor
            self._threshold = max(self._threshold, math.sqrt(max(right) * min(others)))
        enough = (length for length in _LISTS if self._tells or self._recall(length) >= _ENOUGH)
        self._shortest = next(enough, _LISTS[-1])

    def _recall(self, length: int) -> float:
        """The share of held-out public tokens in the coarse map's lists of this length."""
        return float((self._ranks < length).float().mean())

    def _distances(self, prefix: Prefix, tokens: Tensor, position: Tensor, arrived: Tensor) -> Tensor:
        """How far each token `[m]` is from explaining what arrived `[h]`, `[m]`."""
        expected = self._knowledge.expect(self._front.candidates(prefix, tokens, position))
        return self._noise.distances(expected, arrived)

    def _read_all(self, found: Sequence[Row]) -> Iterator[tuple[Row, Tensor, list[float]]]:
        """Each sequence with what `_read` gives."""
        with self._knowledge.progress("matching tokens", sum(len(row.hidden) for row in found)) as advance:
            for row in found:
                yield row, *self._read(row, advance)

    def _read(self, row: Row, advance: Callable[[], None]) -> tuple[Tensor, list[float]]:
        """The tokens of a sequence `[n]`, and the chance that each one's list held it."""
        n, prefix = len(row.hidden), self._front.begin()
        if not n:
            return torch.empty(0, dtype=torch.long), []
        scores = self._map.scores(row.hidden)
        token, explained = self._first.find(row.hidden[0], row.positions[0])
        self._front.extend(prefix, token[None], row.positions[:1])
        tokens, credits, run = [token], [float(explained)], _RUNS[0]
        advance()
        while len(tokens) < n:
            if self._tells:
                held = self._check_run(prefix, row, scores[len(tokens) : len(tokens) + run].argmax(1))
                tokens.extend(held)
                for _ in held:
                    advance()
                credits.extend(1.0 for _ in held)
                run = min(2 * run, _RUNS[1]) if len(held) == run else _RUNS[0]
                if len(tokens) == n:
                    break
            place = len(tokens)
            # Behind a token that was not found nothing fits, and the whole vocabulary would be searched in vain.
            token, credit = self._search(prefix, row, scores[place], everything=all(credits))
            self._front.extend(prefix, token[None], row.positions[place, None])
            tokens.append(token)
            credits.append(credit)
            advance()
        return torch.stack(tokens), credits

    def _check_run(self, prefix: Prefix, row: Row, drafted: Tensor) -> list[Tensor]:
        """The first of the drafted tokens `[m]` that explain what came; the prefix goes on with them."""
        place = prefix.length
        span = slice(place, place + len(drafted))
        expected = self._knowledge.expect(self._front.extend(prefix, drafted, row.positions[span]))
        fits = self._noise.distances(expected, row.hidden[span]) <= self._threshold
        n_held = int(fits.long().cumprod(0).sum())
        prefix.crop(place + n_held)
        return list(drafted[:n_held])

    def _search(self, prefix: Prefix, row: Row, scores: Tensor, *, everything: bool) -> tuple[Tensor, float]:
        """The next token by longer and longer lists, and the chance that the list held it."""
        place, size = prefix.length, len(scores)
        longest = size if everything else min(_LISTS[-1], size)
        stops = [
            stop for stop in (*_LISTS, *range(2 * _LISTS[-1], size, _LISTS[-1])) if self._shortest <= stop < longest
        ]
        order = scores.argsort(descending=True) if everything else scores.topk(longest).indices
        best, token, tried = float("inf"), order[0], 0
        for stop in (*stops, longest):
            distances = self._distances(prefix, order[tried:stop], row.positions[place], row.hidden[place])
            if (nearest := float(distances.min())) < best:
                best, token = nearest, order[tried + int(distances.argmin())]
            if best <= self._threshold:
                return token, 1.0 if self._tells else self._recall(stop)
            tried = stop
        return token, 0.0


def _coarse_map(knowledge: Knowledge) -> tuple[CoarseMap, Tensor]:
    """A coarse map, and how many tokens it places before the right one at each held-out public position.

    The ridge regression where its shortest list holds nearly everything; else the better of it and the inverter.
    """

    def judged(coarse: CoarseMap) -> tuple[CoarseMap, Tensor]:
        return coarse, torch.cat([ranks(coarse, text)[1:] for text in held_out(knowledge)])

    def recall(of: tuple[CoarseMap, Tensor]) -> float:
        return float((of[1] < _LISTS[0]).float().mean())

    ridge = judged(ridge_of(knowledge))
    return ridge if recall(ridge) >= _ENOUGH else max(ridge, judged(inverter_of(knowledge)), key=recall)
