"""Skeletons: what stands on the edge for the linears of a layer that the cloud holds.

They have the names, shapes, dtype and device of the real ones and no weights, so that PEFT wraps them like any other
module. A skeleton gives zeros: what a wrapped one returns is the adapter's own contribution, which is all that the edge
adds to a layer that runs elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from isthmus.backbone.errors import UnsupportedCallError

ALLOWED = "LoRA, rsLoRA, AdaLoRA, VeRA, LoHa, LoKr"
"""PEFT methods that work on a linear's input alone; see `isthmus.backbone.site_methods`."""

# What a tensor without values can be asked for.
_METADATA = frozenset(
    {
        Tensor.shape.__get__,  # type: ignore[attr-defined]  # getset descriptors, which the stubs call properties
        Tensor.dtype.__get__,  # type: ignore[attr-defined]
        Tensor.device.__get__,
        Tensor.layout.__get__,  # type: ignore[attr-defined]
        Tensor.ndim.__get__,  # type: ignore[attr-defined]
        Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
        Tensor.requires_grad.__set__,  # type: ignore[attr-defined]  # AdaLoRA freezes what it wraps
        Tensor.is_meta.__get__,  # type: ignore[attr-defined]
        Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.element_size,
        Tensor.is_floating_point,
        Tensor.is_complex,
        Tensor.__len__,
    }
)


class SkeletonWeight(Tensor):
    """The shape, dtype and device of a weight that is not here; whatever asks for its values is refused."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _METADATA:
            asked = getattr(getattr(func, "__self__", None), "__name__", None) or getattr(
                func, "__name__", "a function"
            )
            raise UnsupportedCallError(
                f"the weights of the cloud's layers are not here, and something asks for their values ({asked}): a "
                f"method on these layers has to work on their input alone ({ALLOWED}); merge on the whole model"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes an argument that nobody gives
        return f"SkeletonWeight(shape={list(self.shape)}, dtype={self.dtype})"


class _Skeleton(nn.Module):
    """Common to both kinds. Subclasses say the weight's shape and the numbers of features."""

    placed: Tensor
    n_out: int

    def _place(self, like: Tensor) -> None:
        # One element that follows the model from device to device and from dtype to dtype, and never into a file.
        self.register_buffer("placed", torch.zeros((), dtype=like.dtype), persistent=False)

    @property
    def weight(self) -> Tensor:
        """Shape, dtype and device of the real weight."""
        shape = self._weight_shape()
        return self.placed.expand(shape).as_subclass(SkeletonWeight)

    @property
    def bias(self) -> None:
        """The cloud's too."""
        return None

    def _weight_shape(self) -> tuple[int, int]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Zeros `[..., out]`, whatever `x` `[..., in]` is."""
        return x.new_zeros(*x.shape[:-1], self.n_out)


class SkeletonLinear(_Skeleton, nn.Linear):  # type: ignore[misc, override]  # a weight that cannot be set
    """Stands for an `nn.Linear` of the cloud."""

    def __init__(self, real: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = real.in_features, real.out_features
        self.n_out = real.out_features
        self._place(real.weight)

    def _weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features


class SkeletonConv1D(_Skeleton, Conv1D):  # type: ignore[misc]  # transformers' own class has no types
    """Stands for a `Conv1D` of the cloud: a linear with a transposed weight, GPT-2's."""

    def __init__(self, real: Any) -> None:
        nn.Module.__init__(self)
        self.nx, self.nf = real.nx, real.nf
        self.n_out = real.nf
        self._place(real.weight)

    def _weight_shape(self) -> tuple[int, int]:
        return self.nx, self.nf


class SkeletonLayer(nn.Module):
    """A decoder layer of the cloud: passes its input through, and has a place for each linear of the real one."""

    def __init__(self, real: nn.Module) -> None:
        super().__init__()
        for name, module in named_linears(real):
            _put(self, name, SkeletonLinear(module) if isinstance(module, nn.Linear) else SkeletonConv1D(module))

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Return `hidden_states` as they are: the gate has already done the work."""
        return hidden_states


def named_linears(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linears of a real decoder layer, which can be sites, by their names inside it."""
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Add `module` at a dotted path, with plain containers on the way."""
    *parents, leaf = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(leaf, module)
