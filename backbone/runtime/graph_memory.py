"""What autograd keeps of a forward for its backward: less of it, and how many bytes.

The weights are frozen, so a linear keeps nothing of its input. What is left are inputs of norms, of attention and of
the activation functions, and what those give, which the product after them wants. The latter is not kept, but computed
again from the former in the backward: elementwise, with the same bits, a fifth less memory with a gated MLP. That is
the cheapest piece of selective recomputation (Korthikanti et al. 2022, arXiv 2205.05198).

autograd's hooks see each tensor that is kept, and each costs Python's lock in the forward and in the backward, which
threads that compute side by side have to take turns at. So they are there only from an activation function to the end
of the module that calls it, and everywhere only while bytes are counted.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from isthmus.backbone.split.span import SpanInput

_AGAIN: Mapping[str, Callable[[Any], Tensor]] = {
    "SiluBackward0": lambda node: functional.silu(node._saved_self),
    "GeluBackward0": lambda node: functional.gelu(node._saved_self, approximate=node._saved_approximate),
}
"""Node of the graph -> its output, computed from what it keeps anyway."""

_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")
"""The modules that activation functions are defined in."""


@dataclass(slots=True)
class KeptBytes:
    """The tensors that a graph keeps, each storage once; weights not counted."""

    weights: Collection[int]
    storages: dict[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """In bytes."""
        return sum(self.storages.values())

    def add(self, tensor: Tensor) -> None:
        """Count a tensor."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:  # they are shared by all graphs
            self.storages[storage.data_ptr()] = storage.nbytes()


class _Here(threading.local):
    """What a thread is about."""

    def __init__(self) -> None:
        self.counted: KeptBytes | None = None
        self.hooks: list[saved_tensors_hooks] = []  # from an activation function to the end of what it is part of


_here = _Here()
_frugal: WeakSet[nn.Module] = WeakSet()  # those that have hooks


def keep_little(module: nn.Module) -> None:
    """From now on graphs of this module keep little. Its outputs and gradients have the same bits."""
    for parent in module.modules():
        activations = [child for child in parent.children() if type(child).__module__ in _ACTIVATIONS]
        for activation in activations:
            if activation not in _frugal:
                activation.register_forward_hook(_enter)
                _frugal.add(activation)
        if activations and parent not in _frugal:
            parent.register_forward_hook(_leave, always_call=True)
            _frugal.add(parent)


@contextmanager
def counting(weights: Collection[int]) -> Iterator[KeptBytes]:
    """Count what graphs keep that are built within, in this thread; they keep little.

    Args:
        weights: The addresses of the storages that count as weights.
    """
    kept = KeptBytes(weights)
    before, _here.counted = _here.counted, kept
    try:
        with saved_tensors_hooks(_pack, _unpack):
            try:
                yield kept
            finally:
                _leave()  # a call that is abandoned ends within a module, and no hook of that is called
    finally:
        _here.counted = before


def storages_of(module: nn.Module) -> dict[int, int]:
    """The addresses of the storages of a module's parameters and buffers, and the bytes of each."""
    storages = (each.untyped_storage() for each in (*module.parameters(), *module.buffers()))
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


Point = tuple[float, float]  # a sequence's length, and what a position in it takes
Sort = tuple[bool, bool]  # of an input: whether it has padding or packed sequences, and whether it fills the window


@dataclass(slots=True)
class GraphBytes:
    """How much a graph keeps, going by those that were counted.

    What it keeps of a token position is the same everywhere, or grows with the length of the sequence, as attention may
    keep a number for each pair of positions. So it is taken to be on a line between the shortest and the longest that
    were counted. Attention keeps more where it has a mask, so there is a line for each sort of inputs. A pass of
    several sorts keeps a few percent more than they say, as each sort's keys and values are held with the others'.

    Attributes:
        window: Attention's, in positions; None where it sees all.
    """

    window: int | None = None
    _lines: dict[Sort, tuple[Point, Point]] = field(default_factory=dict)

    def expected(self, inputs: Sequence[SpanInput]) -> int | None:
        """Bytes of a graph for these inputs; None where it has to be counted."""
        parts = [self._part(alike, sort) for sort, alike in self._sorted(inputs).items()]
        known = [part for part in parts if part is not None]
        return round(sum(known)) if len(known) == len(parts) else None

    def learn(self, inputs: Sequence[SpanInput], nbytes: int) -> None:
        """A graph for these inputs was counted; where they are of several sorts, nobody can tell what is whose."""
        sort, *others = self._sorted(inputs)
        if others or self.expected(inputs) is not None:
            return
        positions, length = _extent(inputs)
        point = length, nbytes / positions
        shortest, longest = self._lines.get(sort, (point, point))
        self._lines[sort] = min(shortest, point), max(longest, point)

    def _part(self, inputs: Sequence[SpanInput], sort: Sort) -> float | None:
        """What a graph keeps of inputs of one sort."""
        positions, length = _extent(inputs)
        (shortest, least), (longest, most) = self._lines.get(sort, ((math.inf, 0.0), (0.0, 0.0)))
        if not shortest <= length <= longest:
            return None
        along = (length - shortest) / (longest - shortest) if longest > shortest else 0.0
        return positions * (least + along * (most - least))

    def _sorted(self, inputs: Sequence[SpanInput]) -> dict[Sort, list[SpanInput]]:
        sorts: dict[Sort, list[SpanInput]] = {}
        for each in inputs:
            mask, places = each.attention_mask, each.position_ids
            if mask is None:
                irregular = places is not None and bool((places.diff() != 1).any())
            else:
                irregular = not mask.all()
            fills = self.window is not None and each.hidden.shape[1] >= self.window
            sorts.setdefault((irregular, fills), []).append(each)
        return sorts


def _extent(inputs: Sequence[SpanInput]) -> tuple[int, float]:
    """How many positions, and how long the sequence is that one of them is in, on average."""
    positions = sum(each.positions for each in inputs)
    return positions, sum(each.positions * each.hidden.shape[1] for each in inputs) / positions


def _pack(tensor: Tensor) -> Any:
    node = tensor.grad_fn
    if node is not None and node.name() in _AGAIN:
        return node
    if _here.counted is not None:
        _here.counted.add(tensor)
    return tensor.detach()


def _unpack(packed: Any) -> Tensor:
    return packed if isinstance(packed, Tensor) else _AGAIN[packed.name()](packed)


def _enter(*_: Any) -> None:
    if torch.is_grad_enabled():
        hooks = saved_tensors_hooks(_pack, _unpack)
        hooks.__enter__()
        _here.hooks.append(hooks)


def _leave(*_: Any) -> None:
    while _here.hooks:
        _here.hooks.pop().__exit__()
