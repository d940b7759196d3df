"""The sequences of a recording one by one, and which text each is.

The order of a run's batches is known, so is the order of its calls. With decoys, each micro-batch is sent in several
calls, and the one that has a text's row is the one whose hidden states are nearest to the text's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from isthmus.common.errors import DataError
from isthmus.edge.data.batches import IGNORED
from isthmus.experiments.leak.leak_texts import Text
from isthmus.privacy.attacks.attack import UNKNOWN
from isthmus.privacy.attacks.front import Front
from isthmus.privacy.recording.traffic import Backward, Forward, Traffic


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch of a run, and the calls that it was sent in: one for all rows, one for each, or with decoys.

    Attributes:
        copies: Calls that have each row, one of which is the real one.
    """

    texts: tuple[Text, ...]
    forwards: tuple[Forward, ...]
    copies: int


@dataclass(frozen=True, slots=True)
class Crossed:
    """One sequence as it crossed, without padding.

    Attributes:
        text: What it was; None for a decoy.
        text_number: Of the text that was sent there; a text and its decoys have the same.
        forward: A call of it alone.
        backward: Its gradient; None where none went up.
    """

    text: Text | None
    text_number: int
    forward: Forward
    backward: Backward | None = None


def sequences(batches: Sequence[Batch], front: Front, backwards: Sequence[Backward] = ()) -> list[Crossed]:
    """The sequences of micro-batches, in their order.

    Args:
        front: The edge's own first layers, nearly: decoys are told by it.
        backwards: The calls' gradients, where they went up.

    Raises:
        DataError: The calls do not have the batches' rows.
    """
    gradients = {each.call: each for each in backwards}
    found: list[Crossed] = []
    first = 0
    for batch in batches:
        rows = [(forward, row) for forward in batch.forwards for row in range(len(forward.hidden))]
        if len(rows) != batch.copies * len(batch.texts):
            raise DataError(
                f"the recording has {len(rows)} sequences of a batch of {len(batch.texts)}: record the whole run, with "
                "a larger --record-mib"
            )
        real = _real_rows(batch, front)
        for number, (forward, row) in enumerate(rows):
            place = number % len(batch.texts)
            text = batch.texts[place] if real[place] == number // len(batch.texts) else None
            length = len(batch.texts[place].encoded.input_ids)
            gradient = gradients.get(forward.call)
            alone = _alone(forward, row, length, len(found))
            backward = None if gradient is None else _gradient_alone(gradient, row, length, len(found))
            found.append(Crossed(text, first + place, alone, backward))
        first += len(batch.texts)
    return found


def traffic_of(traffic: Traffic, chosen: Sequence[Crossed]) -> Traffic:
    """The traffic of these sequences alone."""
    backwards = tuple(each.backward for each in chosen if each.backward is not None)
    return replace(traffic, forwards=tuple(each.forward for each in chosen), backwards=backwards, decodes=())


def labels_of(text: Text | None, length: int) -> Tensor:
    """At each place the token that it learns to predict, `[length]`; -1 where none, and everywhere of a decoy."""
    ahead = torch.full((length,), UNKNOWN)
    if text is not None:
        labels = torch.tensor(text.encoded.labels)
        ahead[:-1] = labels[1:].masked_fill(labels[1:] == IGNORED, UNKNOWN)
    return ahead


def _real_rows(batch: Batch, front: Front) -> list[int]:
    """The copy that has each text."""
    if batch.copies == 1:
        return [0] * len(batch.texts)
    real = []
    for row, text in enumerate(batch.texts):
        own = front.states(text.tokens)
        distances = [float((forward.hidden[row, : len(own)] - own)[1:].norm()) for forward in batch.forwards]
        real.append(min(range(len(distances)), key=distances.__getitem__))
    return real


def _alone(forward: Forward, row: int, length: int, call: int) -> Forward:
    output = forward.output
    return replace(
        forward,
        call=call,
        hidden=forward.hidden[row : row + 1, :length],
        mask=None,
        positions=None if forward.positions is None else forward.positions[-1:, :length],
        output=None if output is None else output[row : row + 1, :length],
    )


def _gradient_alone(backward: Backward, row: int, length: int, call: int) -> Backward:
    return replace(backward, call=call, gradient=backward.gradient[row : row + 1, :length], returned=None)


def in_order(forwards: Sequence[Forward], texts: Sequence[Sequence[Text]], copies: int) -> Iterator[Batch]:
    """Which calls are of which micro-batch, by the micro-batches' order.

    Raises:
        DataError: There are too few or too many calls.
    """
    calls = list(forwards)
    for rows in texts:
        taken: list[Forward] = []
        while calls and sum(len(call.hidden) for call in taken) < copies * len(rows):
            taken.append(calls.pop(0))
        yield Batch(tuple(rows), tuple(taken), copies)
    if calls:
        raise DataError(f"the recording has {len(calls)} calls more than the run's batches: record one run alone")
