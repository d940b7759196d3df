"""Products of frozen linears for several calls at once, where the calls meet.

Calls that pause have a thread, a graph and a place in the span of their own each; what they share is the reading of the
weights. A call that runs beside others does not compute the products of a group of linears: it *enlists* its rows there
and waits. Whoever drives the calls holds a *meeting*: the rows of all calls that have enlisted at one place, in one
product for each linear. The rows of a product depend on nothing but themselves, so the bits are those of each call by
itself, under the same condition as in `isthmus.backbone.packing`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from isthmus.backbone.quantize import weight_of


class FrozenLinear(Protocol):
    """A linear of the span; see `isthmus.backbone.site_visit.AskingLinear`."""

    def plain(self, x: Tensor) -> Tensor:
        """The output `[..., out]` of the linear itself for `x` `[..., in]`."""


@dataclass(frozen=True, slots=True, eq=False)
class Enlisted:
    """Rows of one call that wait for the products of linears.

    Attributes:
        group: The number of the linears' group in the span's running order.
        linears: The linears, which read one input.
        rows: On the way forward their input `[N, in]`; on the way back the gradient of each one's output `[N, out]`.
        back: Whether it is on the way back.
    """

    group: int
    linears: tuple[FrozenLinear, ...]
    rows: tuple[Tensor, ...]
    back: bool

    @property
    def count(self) -> int:
        """How many rows `N` there are."""
        return len(self.rows[0])

    @property
    def place(self) -> tuple[bool, int, tuple[FrozenLinear, ...]]:
        """Where they wait: what is at one place can be computed together."""
        return self.back, self.group, self.linears

    @property
    def order(self) -> tuple[bool, int]:
        """Grows along a pass; a forward that is repeated comes before the backward that needs it."""
        return self.back, -self.group if self.back else self.group


Products = Sequence[Tensor]
"""For each linear: its output `[N, out]`, or what the gradient of its output gives its input, `[N, in]`."""


class Company:
    """Tells a call whether it runs beside others, and takes it to their meetings.

    Args:
        enlist: Hands rows to whoever drives the call, waits, and returns the products, or why there are none.

    Attributes:
        present: Whether others run beside it. The call's driver says so whenever it lets the call go on.
    """

    def __init__(self, enlist: Callable[[Enlisted], Products | RuntimeError]) -> None:
        self.present = False
        self._enlist = enlist

    def forward(self, group: int, linears: tuple[FrozenLinear, ...], x: Tensor) -> list[Tensor]:
        """The output `[..., out]` of each linear for `x` `[..., in]`, without a graph.

        Raises:
            RuntimeError: A product of several calls has failed.
        """
        return self._products(Enlisted(group, linears, (_rows(x),), back=False), x.shape)

    def backward(self, group: int, linears: tuple[FrozenLinear, ...], gradients: Sequence[Tensor]) -> list[Tensor]:
        """What the gradient `[..., out]` of each linear's output gives its input, `[..., in]`.

        Raises:
            RuntimeError: As for `forward`.
        """
        return self._products(Enlisted(group, linears, tuple(map(_rows, gradients)), back=True), gradients[0].shape)

    def _products(self, enlisted: Enlisted, shape: torch.Size) -> list[Tensor]:
        found = self._enlist(enlisted)
        if isinstance(found, RuntimeError):
            raise found
        return [product.view(*shape[:-1], -1) for product in found]


class Meetings:
    """Computes what calls have enlisted for.

    Attributes:
        held: How many meetings there were, those of one call among them.
        calls: How many calls there were in them, each counted at each meeting.
    """

    def __init__(self) -> None:
        self.held, self.calls = 0, 0

    @property
    def calls_per_meeting(self) -> float:
        """How many calls have met on average; 0 before the first meeting."""
        return self.calls / self.held if self.held else 0.0

    def hold(self, parties: Sequence[Enlisted]) -> list[Products]:
        """The products of each party, all of which wait at one place. No party holds memory of another's."""
        self.held += 1
        self.calls += len(parties)
        first = parties[0]
        sizes = [party.count for party in parties]
        with torch.no_grad():
            together = [torch.cat(rows)[None] for rows in zip(*(party.rows for party in parties), strict=True)]
            if first.back:
                products = [product_back(*each) for each in zip(first.linears, together, strict=True)]
            else:
                products = [linear.plain(together[0]) for linear in first.linears]
            parts = [[part.clone() for part in torch.split(product[0], sizes)] for product in products]
        return list(zip(*parts, strict=True))


def product_back(linear: FrozenLinear, gradient: Tensor) -> Tensor:
    """What the gradient `[..., out]` of a linear's output gives its input, `[..., in]`: torch's own product."""
    return (_rows(gradient) @ weight_of(linear)).view(*gradient.shape[:-1], -1)


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1])
