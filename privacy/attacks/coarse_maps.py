"""Coarse maps: from a hidden state at the cut to a score for each token of the vocabulary."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from isthmus.common.progress import Progress, watched
from isthmus.privacy.attacks.attack import Knowledge, PublicText

HELD_OUT = 8
"""One public text in so many is not learned from, and tells how good a map is."""

_FIRST_TOKENS = 1024
_FEW = 256  # candidates of one forward, whose mask has the square of their number
_RIDGE = 0.1
_TOKENS_A_STEP = 512
_NEGATIVES = 2048
_RATE = 1e-3
_CLAMP = 8.0

_Affine = tuple[Tensor, Tensor]  # a matrix [h, e] and a row [e]


class CoarseMap(Protocol):
    """Scores every token at every position of a sequence."""

    def scores(self, hidden: Tensor) -> Tensor:
        """Scores `[n, V]`, the likeliest token highest, of the hidden states `[n, h]` of one sequence."""


def learned_from(knowledge: Knowledge) -> tuple[PublicText, ...]:
    """The public texts that maps are learned from."""
    return tuple(text for number, text in enumerate(knowledge.public_texts) if number % HELD_OUT)


def held_out(knowledge: Knowledge) -> tuple[PublicText, ...]:
    """The public texts that tell how good a map is."""
    return knowledge.public_texts[::HELD_OUT]


def first_tokens(knowledge: Knowledge) -> Tensor:
    """The whole vocabulary, likely first tokens first, `[V]`: by their places and numbers in public texts."""
    counts = torch.zeros(knowledge.n_tokens, dtype=torch.float64)
    for tokens in knowledge.public:
        counts += torch.bincount(tokens, minlength=knowledge.n_tokens)
        counts[tokens[0]] += 1e6
    return counts.argsort(descending=True, stable=True)


class RidgeMap:
    """A ridge regression from hidden state to token embedding; tokens score by the cosine with the result.

    The first position is a map of its own, learned from single tokens: models make it a sink of attention, with a norm
    a hundred times that of others, which would spoil the regression.

    Args:
        knowledge: Whose public texts are learned from.
    """

    def __init__(self, knowledge: Knowledge) -> None:
        texts = learned_from(knowledge)
        embedding = knowledge.front.embedding
        self._rows = normalize(embedding, dim=1)
        self._later = _solve(
            torch.cat([text.sent[1:] for text in texts]), embedding[torch.cat([text.tokens[1:] for text in texts])]
        )
        first = first_tokens(knowledge)[:_FIRST_TOKENS]
        sent = torch.cat([knowledge.sent_alone(tokens) for tokens in torch.split(first, _FEW)])
        self._first = _solve(sent, embedding[first])

    def scores(self, hidden: Tensor) -> Tensor:
        """See `CoarseMap`."""
        return self.embeddings(hidden) @ self._rows.T

    def embeddings(self, hidden: Tensor) -> Tensor:
        """The regression's token embeddings of one sequence `[n, h]`, of norm 1, `[n, e]`."""
        parts = [_applied(self._first, hidden[:1]), _applied(self._later, hidden[1:])]
        return normalize(torch.cat(parts), dim=1)


def _solve(inputs: Tensor, targets: Tensor) -> _Affine:
    """The affine map of least squared error, with a little weight on a small matrix: channels count by their spread."""
    x, y = inputs.double(), targets.double()
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-9)
    z = (x - mean) / spread
    gram = z.T @ z + _RIDGE * torch.eye(z.shape[1], dtype=z.dtype)
    matrix = torch.linalg.solve(gram, z.T @ (y - y.mean(0))) / spread[:, None]
    return matrix.float(), (y.mean(0) - mean @ matrix).float()


def _applied(affine: _Affine, hidden: Tensor) -> Tensor:
    return hidden @ affine[0] + affine[1]


class InverterMap(nn.Module):
    """One transformer layer over all hidden states of a sequence, beside a ridge regression, to token embeddings.

    Tokens score by the cosine with the result, so that it can name tokens that it has never seen. Each step compares
    with the tokens of its batch and with a random choice of others. The seed of `knowledge` decides everything.

    Args:
        knowledge: Whose public texts are learned from.
    """

    def __init__(self, knowledge: Knowledge) -> None:
        super().__init__()
        texts = learned_from(knowledge)
        self._ridge = ridge_of(knowledge)
        self._rows = normalize(knowledge.front.embedding, dim=1)
        later = torch.cat([text.sent[1:] for text in texts])
        self._mean, self._spread = later.mean(0), later.std(0).clamp_min(1e-9)
        h, e = later.shape[1], self._rows.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(knowledge.seed)
            self.layer = nn.TransformerEncoderLayer(
                h, math.gcd(h, 8), 2 * h, dropout=0.0, batch_first=True, norm_first=True
            )
            self.out = nn.Linear(h, e)
            nn.init.zeros_(self.out.weight)  # begins as the ridge regression
            nn.init.zeros_(self.out.bias)
            self.sharpness = nn.Parameter(torch.tensor(math.log(20.0)))
            self._learn(texts, knowledge.inverter_steps, knowledge.progress)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def scores(self, hidden: Tensor) -> Tensor:
        """See `CoarseMap`."""
        return self._embeddings([hidden])[0] @ self._rows.T

    def _embeddings(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """Token embeddings of norm 1, `[n, e]` each, of hidden states `[n, h]` each."""
        scaled = [((hidden - self._mean) / self._spread).clamp(-_CLAMP, _CLAMP) for hidden in sequences]
        padded = nn.utils.rnn.pad_sequence(scaled, batch_first=True)
        lengths = torch.tensor([len(hidden) for hidden in sequences])
        padding = torch.arange(padded.shape[1])[None] >= lengths[:, None]
        found = self.out(self.layer(padded, src_key_padding_mask=padding))
        return [
            normalize(self._ridge.embeddings(hidden) + row[: len(hidden)], dim=1)
            for hidden, row in zip(sequences, found, strict=True)
        ]

    def _learn(self, texts: Sequence[PublicText], steps: int, progress: Progress) -> None:
        optimizer = torch.optim.AdamW(self.parameters(), lr=_RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps, pct_start=0.1)
        batches = _batches(texts)
        for _ in watched(progress, "training an inverter: steps", range(steps)):
            batch = next(batches)
            tokens = torch.cat([text.tokens for text in batch])
            others = torch.randint(len(self._rows), (min(_NEGATIVES, len(self._rows)),))
            compared, targets = torch.unique(torch.cat([tokens, others]), return_inverse=True)
            found = torch.cat(self._embeddings([text.sent for text in batch]))
            logits = self.sharpness.exp() * found @ self._rows[compared].T
            loss = cross_entropy(logits, targets[: len(tokens)])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def _batches(texts: Sequence[PublicText]) -> Iterator[list[PublicText]]:
    """Texts in a random order again and again, in batches of some `_TOKENS_A_STEP` tokens."""
    batch: list[PublicText] = []
    while True:
        for number in torch.randperm(len(texts)).tolist():
            batch.append(texts[number])
            if sum(len(text.tokens) for text in batch) >= _TOKENS_A_STEP:
                yield batch
                batch = []


# The last maps are kept, for the attacks that use them one after the other.
@functools.lru_cache(maxsize=1)
def ridge_of(knowledge: Knowledge) -> RidgeMap:
    """The ridge regression."""
    return RidgeMap(knowledge)


@functools.lru_cache(maxsize=1)
def inverter_of(knowledge: Knowledge) -> InverterMap:
    """The learned map."""
    return InverterMap(knowledge)


def ranks(found: CoarseMap, text: PublicText) -> Tensor:
    """How many tokens score higher than the right one at each position, `[n]`."""
    scores = found.scores(text.sent)
    return (scores > scores.gather(1, text.tokens[:, None])).sum(1)
