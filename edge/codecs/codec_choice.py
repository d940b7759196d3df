"""Choose the wire's codecs by what they do to the adapters' gradients.

Theory of operation
    A codec's error turns the gradient; 1 - cosine, its loss, says how far. The errors of the four directions have
    little to do with each other, so the loss of a combination is about the sum of what each direction alone loses.
    The combinations are looked at from the cheapest on. One is passed over as soon as what is known of its directions
    exceeds what the target allows; what is not known is measured, a direction at a time, the rest in fp32. The first
    one that the sum allows is tried as a whole, and is the choice if it holds the target. If it does not, the sum
    promised too much, and counts for as many times more from then on.

A trial costs a forward and a backward. A choice takes about ten.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from isthmus.common.errors import ConfigError, NonFiniteError
from isthmus.edge.codecs.wire_codecs import DIRECTIONS, WireCodecs
from isthmus.protocol.tensor_codecs import ACTIVATION_CODECS

_MISSED = -1.0  # the cosine that gradients which are not finite count for: that of the opposite direction
_TINY_LOSS = 1e-12


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen.

    Attributes:
        cosine: of the gradients with them to the gradients with fp32, at least the target.
    """

    codecs: WireCodecs
    cosine: float


def cosine(a: Tensor, b: Tensor) -> float:
    """The cosine of two tensors of the same size, computed in float64; 0 where one of them is zero."""
    a, b = a.detach().flatten().to(torch.float64), b.detach().flatten().to(torch.float64)
    norms = float(a.norm()) * float(b.norm())
    return float(a @ b) / norms if norms else 0.0


def choose_codecs(
    gradients: Callable[[WireCodecs], Tensor],
    offered: tuple[str, ...],
    hidden_size: int,
    target: float,
) -> Choice:
    """Find the codecs with the fewest bytes whose gradients keep to a target.

    Args:
        gradients: runs a forward and backward of one micro-batch, always the same and from the same random state, over
            the wire with these codecs, and returns the adapters' gradients as one vector. A `NonFiniteError` of it
            counts as a miss.
        offered: names of the cloud's codecs; those that this version does not know are left out.
        target: the smallest cosine to the gradients with fp32, between 0 and 1.

    Returns:
        The choice; fp32 with a cosine of 1 where nothing else holds the target.

    Raises:
        ConfigError: the cloud does not offer fp32, or the gradients are zero with it.
        NonFiniteError: the gradients are not finite with fp32.
    """
    WireCodecs().check(offered)
    trials = _Trials(gradients)
    known = [name for name in ACTIVATION_CODECS if name in offered]
    combinations = [WireCodecs(*names) for names in product(known, repeat=len(DIRECTIONS))]
    combinations.sort(key=lambda codecs: codecs.bytes_per_token(hidden_size))
    promise = 1.0 - target  # the largest sum that is worth a trial
    for codecs in combinations[: combinations.index(WireCodecs())]:
        expected = trials.expected_loss(codecs, promise)
        if expected > promise:
            continue
        reached = trials.cosine(codecs)
        if reached >= target:
            return Choice(codecs, reached)
        promise = min(promise, (1.0 - target) * max(expected, _TINY_LOSS) / (1.0 - reached))
    return Choice(WireCodecs(), 1.0)


class _Trials:
    """Measures the gradients of each combination once; `gradients` as of `choose_codecs`."""

    def __init__(self, gradients: Callable[[WireCodecs], Tensor]) -> None:
        self._gradients = gradients
        self._cosines = {WireCodecs(): 1.0}
        self._reference = gradients(WireCodecs()).detach().clone()
        if not bool(self._reference.isfinite().all()):
            raise NonFiniteError("the adapters' gradients are NaN or infinite already with fp32: lower --learning-rate")
        if not bool(self._reference.any()):
            raise ConfigError(
                "no codec can be chosen by gradients that are all zero: name a codec, or check that the batch has "
                "tokens to learn and that the adapter is trainable"
            )

    def cosine(self, codecs: WireCodecs) -> float:
        """The cosine of the gradients with these codecs to those with fp32."""
        if codecs not in self._cosines:
            try:
                value = cosine(self._gradients(codecs), self._reference)
            except NonFiniteError:
                value = math.nan
            self._cosines[codecs] = min(1.0, value) if math.isfinite(value) else _MISSED
        return self._cosines[codecs]

    def expected_loss(self, codecs: WireCodecs, enough: float) -> float:
        """The sum of what each direction alone loses; not all of it is measured where a part exceeds `enough`."""
        alone = [replace(WireCodecs(), **{key: getattr(codecs, key)}) for key in DIRECTIONS]
        total = sum(1.0 - self._cosines.get(one, 1.0) for one in alone)
        for one in alone:
            if total > enough:
                break
            if one not in self._cosines:
                total += 1.0 - self.cosine(one)
        return total
