"""What autograd keeps of a forward for its backward: less of it, and how many bytes.

The weights are frozen, so a linear keeps nothing of its input. What is left are inputs of norms, of attention and of
the activation functions, and what those give, which the product after them wants. The latter is not kept, but computed
again from the former in the backward: elementwise, with the same bits, a fifth less memory with a gated MLP. That is
the cheapest piece of selective recomputation (Korthikanti et al. 2022, arXiv 2205.05198).

autograd's hooks see each tensor that is kept, and each costs Python's lock in the forward and in the backward, which
threads that compute side by side have to take turns at. So they are there only from an activation function to the end
of the module that it is part of, and everywhere only while bytes are counted, until it is known what a token position
takes.
"""

from __future__ import annotations

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

from isthmus.backbone.span import SpanInput

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
    for parent in list(module.modules()):
        activations = [child for child in parent.children() if type(child).__module__ in _ACTIVATIONS]
        for activation in activations:
            if activation not in _frugal:
                activation.register_forward_hook(_enter)
        if activations and parent not in _frugal:
            parent.register_forward_hook(_leave, always_call=True)
            _frugal.update((parent, *activations))


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
            yield kept
    finally:
        _here.counted = before


def storages_of(module: nn.Module) -> dict[int, int]:
    """The addresses of the storages of a module's parameters and buffers, and the bytes of each."""
    storages = (each.untyped_storage() for each in (*module.parameters(), *module.buffers()))
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@dataclass(slots=True)
class PositionBytes:
    """How much a graph keeps of a token position, of what was counted.

    Most of it is the same for all positions. What attention keeps besides may grow with its sequence; so a graph is
    counted anew where its positions' sequences are longer, on average, than those of all that were counted before.
    """

    _counted: dict[bool, tuple[float, float]] = field(default_factory=dict)  # whether with masks -> length, bytes

    def expected(self, inputs: Sequence[SpanInput]) -> float | None:
        """Bytes of a position of a graph for these inputs, at most; None where it has to be counted."""
        length, each = self._counted.get(_masked(inputs), (0.0, 0.0))
        return each if _length(inputs) <= length else None

    def learn(self, inputs: Sequence[SpanInput], each: float) -> None:
        """A graph for these inputs was counted: what it keeps of a position."""
        if self.expected(inputs) is None:
            self._counted[_masked(inputs)] = _length(inputs), each


def _masked(inputs: Sequence[SpanInput]) -> bool:
    return any(each.attention_mask is not None for each in inputs)


def _length(inputs: Sequence[SpanInput]) -> float:
    """Of the sequence that a position is in, on average."""
    return sum(each.positions * each.hidden.shape[1] for each in inputs) / sum(each.positions for each in inputs)


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
