"""What autograd keeps of a forward for its backward: less of it, and how many bytes.

The weights are frozen, so a linear keeps nothing of its input. What is left are inputs of norms, of attention and of
the activation functions, and what those give, which the product after them wants. The latter is not kept, but computed
again from the former in the backward: elementwise, with the same bits, a fifth less memory with a gated MLP. That is
the cheapest piece of selective recomputation (Korthikanti et al. 2022, arXiv 2205.05198).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_AGAIN: Mapping[str, Callable[[Any], Tensor]] = {
    "SiluBackward0": lambda node: functional.silu(node._saved_self),
    "GeluBackward0": lambda node: functional.gelu(node._saved_self, approximate=node._saved_approximate),
}
"""Node of the graph -> its output, computed from what it keeps anyway."""


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


@contextmanager
def keeping_little(weights: Collection[int]) -> Iterator[KeptBytes]:
    """Build graphs that keep little, in this thread; what is given counts it.

    Args:
        weights: The addresses of the storages that count as weights.
    """
    kept = KeptBytes(weights)

    def pack(tensor: Tensor) -> Any:
        node = tensor.grad_fn
        if node is not None and node.name() in _AGAIN:
            return node
        kept.add(tensor)
        return tensor.detach()

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else _AGAIN[packed.name()](packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield kept


def storages_of(module: torch.nn.Module) -> dict[int, int]:
    """The addresses of the storages of a module's parameters and buffers, and the bytes of each."""
    storages = (each.untyped_storage() for each in (*module.parameters(), *module.buffers()))
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
