"""How far rounding alone can take the answer to a call: how much the answer moves with the last place of its input.

Two honest computations with other orders of sums differ by rounding. Most answers differ by much the same amount, which
a threshold is measured on. In a few calls the gradient is ill-conditioned: a change of the input in the last place
moves it many times as far as in others. Computing such a call with random changes of this size, some times, and taking
the largest effect, estimates its condition (the idea
of small-sample condition estimates, Kenney and Laub 1994; theirs are averages over random directions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch

from isthmus.backbone.split.span import DTYPES
from isthmus.edge.audit.replay import Replayer
from isthmus.edge.witness.audit_sample import SampledCall
from isthmus.protocol import messages as m
from isthmus.protocol.tensor_codecs import Payload, Role, codec_by_id, decode, encode

PERTURBATIONS: Final = 4
"""How often a call is computed with a changed input. The change may by chance be one that moves the answer little; of n
changes, all do with the n-th power of that chance."""
MAX_ROUNDING_RATIO: Final = 10.0
"""How many times as far as such changes move an answer, rounding may take it. It is chosen: rounding also happens at
each place inside the layers. `isthmus bench audit` says how near honest answers come to it."""


def distances(ours: m.Message, theirs: m.Message) -> list[float] | None:
    """How far two answers are apart, tensor by tensor: |a - b| / |b| in Euclidean norms, `b` being ours.

    Returns:
        A number for each tensor; None where the answers have other tensors.
    """
    mine, others = _tensors(ours), _tensors(theirs)
    if [each.shape for each in mine] != [each.shape for each in others]:
        return None
    return [_distance(*both) for both in zip(mine, others, strict=True)]


def rounding_ratio(
    apart: Sequence[float], threshold: float, call: SampledCall, answer: m.Message, replayer: Replayer, span_dtype: str
) -> float | None:
    """How far an answer is from the run's, over how far changes in the last place of the input move it.

    Args:
        apart: Their distance for each tensor.
        threshold: The distance that any tensor may have.
        call: What was asked.
        answer: The replay's.
        replayer: Who has computed it, and computes the call with changed inputs.
        span_dtype: What the run's cloud computes in, as its session says.

    Returns:
        The largest of the tensors above the threshold. None where nothing is known: such changes move one of them not
        at all, the answers have other tensors, or they cross in another codec than fp32, which may lose them.

    Raises:
        IsthmusError: Whatever the replayer raises.
    """
    if codec_by_id(call.question.reply_codec).name != "fp32":
        return None
    moved = [0.0] * len(apart)
    for seed in range(PERTURBATIONS):
        found = distances(answer, replayer.answer(perturbed(call, span_dtype, seed)))
        if found is None:
            return None
        moved = list(map(max, moved, found))
    over = [(far, move) for far, move in zip(apart, moved, strict=True) if far > threshold]
    return max(far / move for far, move in over) if all(move for _, move in over) else None


def perturbed(call: SampledCall, span_dtype: str, seed: int) -> SampledCall:
    """The call with each number of its hidden states changed by one or two in the last place, up or down.

    Args:
        call: A forward, or a backward with its forward's inputs.
        span_dtype: Whose last place it is.
        seed: Of the signs, which are the same in each audit, so that an audit can be repeated.
    """
    question = call.question
    inputs = question.inputs if isinstance(question, m.Forward) else question.replay
    if inputs is None:
        return call
    hidden = decode(inputs.hidden)
    signs = torch.randint(2, hidden.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    step = torch.finfo(DTYPES.get(span_dtype.partition("+")[0], torch.float32)).eps
    # In fp32, also where hidden states have crossed in another codec, which might lose so small a change.
    changed = encode(hidden * (1 + step * signs), "fp32", Role.ACTIVATION)
    if isinstance(question, m.Forward):
        return replace(call, question=replace(question, hidden=changed))
    return replace(call, question=replace(question, replay=replace(inputs, hidden=changed)))


def _distance(ours: Payload, theirs: Payload) -> float:
    mine, other = decode(ours).double(), decode(theirs).double()
    norm = float(mine.norm())
    return float((mine - other).norm()) / norm if norm else float((other != 0).any())


def _tensors(answer: m.Message) -> tuple[Payload, ...]:
    if isinstance(answer, m.ForwardReply):
        return answer.hidden, *answer.taps
    if isinstance(answer, m.BackwardReply):
        return (*(() if answer.gradient is None else (answer.gradient,)), *answer.leased)
    return ()
