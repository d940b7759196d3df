"""LoRAs that edges have lent: what they add at a linear, and their gradients, for those of several calls at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from isthmus.kernels.grouped import grouped_low_rank


@dataclass(frozen=True, slots=True, eq=False)
class LeasedWeights:
    """A LoRA that was lent: `scale · B A x`, with `A` `[r, in]` and `B` `[out, r]` leaves of the graph."""

    down: Tensor
    up: Tensor
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        """The contribution `[B, S, out]`, in PEFT's order of operations."""
        return functional.linear(functional.linear(x, self.down), self.up) * self.scale


@dataclass(frozen=True, slots=True)
class LoanGradients:
    """The gradients of a LoRA's input `[N, in]`, of its `A` and of its `B`; None of what is not trained."""

    x: Tensor
    down: Tensor | None
    up: Tensor | None


def contributions(loans: Sequence[LeasedWeights], rows: Sequence[Tensor]) -> list[Tensor]:
    """What each LoRA adds, `[N, out]`, for rows `[N, in]` of its own. Has no graph, and holds no memory of another."""
    sizes = [len(each) for each in rows]
    with torch.no_grad():
        found = _product(torch.cat(list(rows)), sizes, loans)
    return [part.clone() for part in torch.split(found, sizes)]


def loan_gradients(
    loans: Sequence[LeasedWeights], rows: Sequence[Tensor], upstream: Sequence[Tensor]
) -> list[LoanGradients]:
    """What the gradients `[N, out]` of contributions give their rows and their LoRAs.

    What lies between `A` and `B` is computed again, which is little beside the linear itself.
    """
    sizes = [len(each) for each in rows]
    with torch.enable_grad():
        x = torch.cat([each.detach() for each in rows]).requires_grad_()
        leaves = [LeasedWeights(_leaf(loan.down), _leaf(loan.up), loan.scale) for loan in loans]
        trained = [each for leaf in leaves for each in (leaf.down, leaf.up) if each.requires_grad]
        given, *found = torch.autograd.grad(_product(x, sizes, leaves), [x, *trained], torch.cat(list(upstream)))
    own = {id(leaf): gradient for leaf, gradient in zip(trained, found, strict=True)}
    parts = torch.split(given, sizes)
    return [
        LoanGradients(part.clone(), own.get(id(leaf.down)), own.get(id(leaf.up)))
        for part, leaf in zip(parts, leaves, strict=True)
    ]


def _leaf(matrix: Tensor) -> Tensor:
    return matrix.detach().requires_grad_(matrix.requires_grad)


def _product(x: Tensor, sizes: Sequence[int], loans: Sequence[LeasedWeights]) -> Tensor:
    scales = [loan.scale for loan in loans]
    return grouped_low_rank(x, sizes, [loan.down for loan in loans], [loan.up for loan in loans], scales)
