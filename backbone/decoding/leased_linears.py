"""Linears of a span that add the LoRAs which edges have leased, each to the rows of its own call."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from isthmus.backbone.runtime.leased_lora import contributions
from isthmus.backbone.sites.leasing import LeasedLora
from isthmus.backbone.skeleton import named_linears

Place = tuple[int, str]
"""The number of a layer in the whole model, and the name of a linear in it."""

_thread = threading.local()


@dataclass(frozen=True, slots=True)
class LeasedRows:
    """The rows of one call in a pass.

    Attributes:
        rows: Which.
        loras: What is leased where.
        one_by_one: Whether each row is computed by itself, so that its bits depend on no other.
    """

    rows: slice
    loras: Mapping[Place, LeasedLora]
    one_by_one: bool


@contextmanager
def leases_active(leased: Sequence[LeasedRows]) -> Iterator[None]:
    """Let the linears add these in what this thread computes inside."""
    _thread.leased = leased
    try:
        yield
    finally:
        _thread.leased = ()


class LeasedLinear(nn.Module):
    """Stands for a linear in a packed pass: its output `[1, T, out]`, with what the calls' LoRAs add.

    Args:
        linear: The linear.
        place: Where it is.
    """

    def __init__(self, linear: nn.Module, place: Place) -> None:
        super().__init__()
        self.linear, self._place = linear, place

    def forward(self, x: Tensor) -> Any:
        """`[1, T, out]` for `x` `[1, T, in]`; PEFT adds the LoRA to the linear's output as well."""
        output = self.linear(x)
        here = [each for each in getattr(_thread, "leased", ()) if self._place in each.loras]
        if not here:
            return output
        rows, loras = list[slice](), list[LeasedLora]()
        for each in here:
            parts = (
                [slice(at, at + 1) for at in range(each.rows.start, each.rows.stop)] if each.one_by_one else [each.rows]
            )
            rows += parts
            loras += [each.loras[self._place]] * len(parts)
        output = output.clone()
        for part, added in zip(rows, contributions(loras, [x[0, part] for part in rows]), strict=True):
            output[0, part] += added
        return output


def add_leased_linears(layers: Sequence[nn.Module], first: int) -> None:
    """Put a `LeasedLinear` in the place of each linear, in place.

    Args:
        layers: Copies of a span's layers that share its tensors.
        first: The first one's number in the whole model.
    """
    for number, layer in enumerate(layers, first):
        for name, linear in list(named_linears(layer)):
            parent, _, own = name.rpartition(".")
            setattr(layer.get_submodule(parent), own, LeasedLinear(linear, (number, name)))
