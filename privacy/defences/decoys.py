"""Decoys: generated rows that are sent like the real ones, and only the edge knows which are which.

Each micro-batch of B rows becomes 1 + count calls of B rows. For each row, and anew in each pass, the key says which of
the calls has the real one; the others have its decoys in the same place, of the same length and with the same mask. So
a real row is computed in a call of the same shape, in the same place, as without decoys, and as a row's bits depend on
nothing else, outputs and gradients of real rows keep theirs. Decoys pass through the edge's own layers and the loss
too, and their gradients go up as well; nothing of that reaches what is trained, be it an adapter or a defence.

An example has the same decoys in every pass, which no other example has: the cloud sees 1 + count texts equally often.

Claims: given rows that cannot be told apart by their contents, nor by their gradients, the cloud guesses with
probability 1 / (1 + count). It does not claim that they cannot be: it is as good as the generator. Every text, real or
not, can be inverted; what is unknown is which are real. A prompt that occurs once is a real text's, so decoys need the
prompts of the data, each as often. A decoy that was cut to its row's length ends in the middle of a sentence, so the
file should have texts of many lengths. As the adapters learn from real rows alone, their loss falls, and the decoys'
does not: a cloud that recovers labels and knows the head can see that in the gradients, more clearly with each epoch.

It costs 1 + count times the traffic and the cloud's work, and more than as much of the edge's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor

from isthmus.common.errors import ConfigError
from isthmus.privacy.defences.defence import IGNORED, Pass
from isthmus.privacy.defences.secret_noise import SecretNoise

Text = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids, and labels: each the token, or -100."""


@dataclass(frozen=True, slots=True)
class DecoyRows:
    """One decoy for each row of a micro-batch: `ids` and `labels`, `[B, S]`."""

    ids: Tensor
    labels: Tensor


class Decoys:
    """Which example has which decoys.

    Args:
        count: Decoys of each real example.
        real: Token ids of all examples of the run, held-out ones too.
        texts: The generated ones, at least `count` for each different real one.

    Raises:
        ConfigError: There are too few that are long enough.
    """

    def __init__(self, count: int, real: Sequence[tuple[int, ...]], texts: Sequence[Text], noise: SecretNoise) -> None:
        self.count = count
        rows = sorted(set(real), key=lambda ids: (len(ids), ids))
        # In a secret order among those of equal length, so that their place in the file says nothing.
        shuffled = [texts[index] for index in noise.order(len(texts), "decoys/texts")]
        left = sorted(((len(text[0]), _learned_from(text), text) for text in shuffled), key=itemgetter(0))
        try:  # a cut shows, so rows first get texts of their own length
            chosen = _chosen(count, rows, left, whole_first=True)
        except ConfigError:  # which can leave too few for the others
            chosen = _chosen(count, rows, left, whole_first=False)
        self._of = {_content(ids): each for ids, each in chosen.items()}

    def of(self, ids: tuple[int, ...]) -> Sequence[Text]:
        """The decoys of an example, cut to its length."""
        return self._of[_content(ids)]

    def rows(self, now: Pass) -> list[DecoyRows]:
        """The decoys of a micro-batch."""
        texts = [self._of[content] for content in now.contents()]
        made = []
        for index in range(self.count):
            ids, labels = now.ids.clone(), torch.full_like(now.ids, IGNORED)
            for row, chosen in enumerate(texts):
                ids[row, now.real[row]] = torch.tensor(chosen[index][0]).to(ids)
                labels[row, now.real[row]] = torch.tensor(chosen[index][1]).to(ids)
            made.append(DecoyRows(ids, labels))
        return made

    def places(self, now: Pass) -> Tensor:
        """Which call has which source, `[1 + count, B]`: source 0 is the real one, the others are the decoys."""
        rows = len(now.real)
        orders = [now.noise.order(1 + self.count, "decoys/places", row, *now.turn) for row in range(rows)]
        return torch.tensor(orders).T


class Arranged(torch.autograd.Function):
    """Sources to calls, row by row; its backward, and `inverse`, go back. No number is changed."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, places: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
        """Call c has row b of source `places[c, b]`."""
        ctx.set_materialize_grads(False)
        ctx.places = places  # type: ignore[attr-defined]  # torch keeps what is set
        return _arrange(places, sources)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Raises RuntimeError where a call has no gradient: a row without one would show itself."""
        given = [gradient for gradient in gradients if gradient is not None]
        if len(given) != len(gradients):
            raise RuntimeError("a decoy has no gradient: its loss is missing")
        return None, *_arrange(inverse(ctx.places), given)  # type: ignore[attr-defined]


_Left = tuple[int, int, Text]
"""A text that no row has yet, behind its length and the place of the first token that is learned."""


def _chosen(
    count: int, rows: Sequence[tuple[int, ...]], texts: Sequence[_Left], *, whole_first: bool
) -> dict[tuple[int, ...], list[Text]]:
    """The decoys of each row, cut to its length.

    The shortest rows first, each with the shortest texts that are long enough and have something to learn where they
    are cut: if any choice works, this does.

    Args:
        rows, texts: The shortest first.
        whole_first: Whether each row gets texts of its own length, before any gets others.

    Raises:
        ConfigError: There are too few.
    """
    left = [*texts]
    chosen: dict[tuple[int, ...], list[Text]] = {ids: [] for ids in rows}
    if whole_first:
        for ids in rows:
            _take(ids, count, left, chosen[ids], most=len(ids))
    for ids in rows:
        _take(ids, count, left, chosen[ids])
        if len(chosen[ids]) < count:
            raise ConfigError(
                f"decoys: {len(texts)} generated examples are too few, or too short, for {len(rows)} real ones "
                f"with {count} each: none is left that has {len(ids)} tokens. Generate more"
            )
    return chosen


def _take(ids: tuple[int, ...], count: int, left: list[_Left], chosen: list[Text], most: int | None = None) -> None:
    """Move texts for a row out of `left`, until it has `count`; of `most` tokens at most."""
    place = bisect_left(left, len(ids), key=itemgetter(0))
    while len(chosen) < count and place < len(left) and (most is None or left[place][0] <= most):
        if left[place][1] < len(ids):
            _, _, (tokens, labels) = left.pop(place)
            chosen.append((tokens[: len(ids)], labels[: len(ids)]))
        else:
            place += 1


def _content(ids: tuple[int, ...]) -> bytes:
    """As `Pass.contents` has it."""
    return torch.tensor(ids, dtype=torch.int64).numpy().tobytes()


def _learned_from(text: Text) -> int:
    """The place of the first token that is learned; its length where none is."""
    return next((place for place, label in enumerate(text[1]) if label != IGNORED), len(text[1]))


def inverse(places: Tensor) -> Tensor:
    """The places that undo `places`."""
    return places.argsort(0)


def _arrange(places: Tensor, sources: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.stack([sources[source][row] for row, source in enumerate(call)]) for call in places.tolist())
