"""Products of frozen linears for several calls at once, where the calls meet.

Calls that pause have a thread, a graph and a place in the span of their own each; what they share is the reading of the
weights. A call that runs beside others does not compute the products of a group of linears: it *enlists* its rows there
and waits. Whoever drives the calls holds a *meeting*: the rows of all calls that have enlisted at one place, in one
product for each linear, and the LoRAs that are lent there in one grouped product. The rows of a product depend on
nothing but themselves, so the bits are those of each call by itself, under the same condition as in
`isthmus.backbone.runtime.sequence_packing`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from isthmus.backbone.checkpoints.weight_quantization import weight_of
from isthmus.backbone.runtime.leased_lora import LeasedWeights, LoanGradients, contributions, loan_gradients


class FrozenLinear(Protocol):
    """A linear of the span; see `isthmus.backbone.runtime.site_visit.AskingLinear`."""

    def plain(self, x: Tensor) -> Tensor:
        """The output `[..., out]` of the linear itself for `x` `[..., in]`."""


@dataclass(frozen=True, slots=True, eq=False)
class Enlisted:
    """Rows of one call that wait for the products of linears.

    Attributes:
        group: The number of the linears' group in the span's running order.
        linears: The linears, which read one input.
        loans: What is lent at each of them; None where nothing is.
        x: Their input `[N, in]`; None on the way back where nothing is lent.
        gradients: On the way back those of each one's output `[N, out]`; none on the way forward.
    """

    group: int
    linears: tuple[FrozenLinear, ...]
    loans: tuple[LeasedWeights | None, ...]
    x: Tensor | None
    gradients: tuple[Tensor, ...] = ()

    @property
    def count(self) -> int:
        """How many rows `N` there are."""
        rows = self.gradients[0] if self.x is None else self.x
        return len(rows)

    @property
    def back(self) -> bool:
        """Whether they are on the way back."""
        return bool(self.gradients)

    @property
    def place(self) -> tuple[bool, int, tuple[FrozenLinear, ...]]:
        """Where they wait: what is at one place can be computed together."""
        return self.back, self.group, self.linears

    @property
    def order(self) -> tuple[bool, int]:
        """Grows along a pass; a forward that is repeated comes before the backward that needs it."""
        return self.back, -self.group if self.back else self.group


@dataclass(frozen=True, slots=True)
class Product:
    """What comes of a meeting for one linear.

    Attributes:
        plain: Its own output `[N, out]`, or what the gradient of that gives its input, `[N, in]`.
        lent: What is added by what is lent there, `[N, out]`, or its gradients; None where nothing is.
    """

    plain: Tensor
    lent: Tensor | LoanGradients | None = None


Products = Sequence[Product]
"""One for each linear."""


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

    def forward(
        self, group: int, linears: tuple[FrozenLinear, ...], loans: tuple[LeasedWeights | None, ...], x: Tensor
    ) -> Products:
        """What linears, and what is lent at them, make of `x` `[..., in]`, without a graph.

        Raises:
            RuntimeError: A product of several calls has failed.
        """
        return self._products(Enlisted(group, linears, loans, rows_of(x)))

    def backward(
        self,
        group: int,
        linears: tuple[FrozenLinear, ...],
        loans: tuple[LeasedWeights | None, ...],
        x: Tensor | None,
        gradients: Sequence[Tensor],
    ) -> Products:
        """What the gradient `[..., out]` of each linear's output gives their input `x`, and what is lent.

        Raises:
            RuntimeError: As for `forward`.
        """
        given = None if x is None else rows_of(x)
        return self._products(Enlisted(group, linears, loans, given, tuple(map(rows_of, gradients))))

    def _products(self, enlisted: Enlisted) -> Products:
        found = self._enlist(enlisted)
        if isinstance(found, RuntimeError):
            raise found
        return found


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
        with torch.no_grad():
            found = [self._of(place, parties) for place in range(len(parties[0].linears))]
        return list(zip(*found, strict=True))

    def _of(self, place: int, parties: Sequence[Enlisted]) -> list[Product]:
        """What a linear gives each party."""
        linear, back = parties[0].linears[place], parties[0].back
        rows = [_there(party.gradients[place] if back else party.x) for party in parties]
        together = torch.cat(rows)[None]
        product = product_back(linear, together) if back else linear.plain(together)
        parts = [part.clone() for part in torch.split(product[0], [len(each) for each in rows])]
        lending = {at: loan for at, party in enumerate(parties) if (loan := party.loans[place]) is not None}
        lent: Sequence[Tensor | LoanGradients] = []
        if lending:
            loans, inputs = list(lending.values()), [_there(parties[at].x) for at in lending]
            lent = loan_gradients(loans, inputs, [rows[at] for at in lending]) if back else contributions(loans, inputs)
        by_party = dict(zip(lending, lent, strict=True))
        return [Product(part, by_party.get(at)) for at, part in enumerate(parts)]


def product_back(linear: FrozenLinear, gradient: Tensor) -> Tensor:
    """What the gradient `[..., out]` of a linear's output gives its input, `[..., in]`: torch's own product."""
    return (rows_of(gradient) @ weight_of(linear)).view(*gradient.shape[:-1], -1)


def rows_of(x: Tensor) -> Tensor:
    """`[..., n]` as `[N, n]`, without a graph."""
    return x.detach().reshape(-1, x.shape[-1])


def _there(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise RuntimeError("a call has enlisted without its rows")
    return tensor
