"""Skeletons: what stands on the edge for the modules of a layer that the cloud holds.

Every module of the real layer has one, so that PEFT finds the names that it finds in the whole model. None has weights.
A linear's skeleton has the shape, dtype and device of the real one, so that PEFT wraps it like any other, and gives
zeros: what a wrapped one returns is the adapter's own contribution, which is all that the edge adds to a layer that
runs elsewhere. Whatever would train a skeleton's own weights is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from isthmus.common.errors import UnsupportedCallError

ALLOWED = "LoRA, rsLoRA, AdaLoRA, VeRA, LoHa, LoKr"
"""PEFT methods that work on a linear's input alone; see `isthmus.backbone.peft_checks`."""

# What a tensor without values can be asked for.
_METADATA = frozenset(
    {
        Tensor.shape.__get__,  # type: ignore[attr-defined]  # getset descriptors, which the stubs call properties
        Tensor.dtype.__get__,  # type: ignore[attr-defined]
        Tensor.device.__get__,
        Tensor.layout.__get__,  # type: ignore[attr-defined]
        Tensor.ndim.__get__,  # type: ignore[attr-defined]
        Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
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

# What makes a weight trainable, or frozen.
_SWITCHES = frozenset({Tensor.requires_grad.__set__, Tensor.requires_grad_})  # type: ignore[attr-defined]


def _not_here(name: str) -> str:
    return (
        f"{name} is in the cloud and cannot be trained as a whole: name modules of the edge's own layers in "
        "target_modules and modules_to_save, or keep to these with layers_to_transform"
    )


def _name_of(args: tuple[Any, ...]) -> str:
    """The linear whose weight is among the arguments of a function of torch."""
    names = (getattr(arg, "linear", None) for arg in args if isinstance(arg, SkeletonWeight))
    return next((name for name in names if name), "a linear")


class SkeletonWeight(Tensor):
    """The shape, dtype and device of a weight that is not here; whatever asks for its values is refused.

    Attributes:
        linear: The name of its linear in the whole model.
    """

    linear: str

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _SWITCHES:
            if (*args[1:], *(kwargs or {}).values()) != (
                False,
            ):  # AdaLoRA freezes what it wraps, which changes nothing
                raise UnsupportedCallError(_not_here(_name_of(args)))
        elif func not in _METADATA:
            asked = getattr(getattr(func, "__self__", None), "__name__", None) or getattr(
                func, "__name__", "a function"
            )
            raise UnsupportedCallError(
                f"{_name_of(args)} is in the cloud, and something asks for the values of its weight ({asked}): use a "
                f"method that works on the input alone ({ALLOWED}), or keep it to the edge's own layers "
                "(layers_to_transform); merge on the whole model"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes an argument that nobody gives
        return f"SkeletonWeight(shape={list(self.shape)}, dtype={self.dtype})"


class SkeletonPart(nn.Module):
    """Stands for a module of the cloud that is no linear: a norm, an attention, an activation.

    Args:
        name: The module's name in the whole model.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freezing changes nothing.

        Raises:
            UnsupportedCallError: It shall be trained.
        """
        if requires_grad:
            raise UnsupportedCallError(_not_here(self.name))
        return self

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of the adapters inside; the module's own are not here.

        Raises:
            UnsupportedCallError: There are none, and who asks means the module's own.
        """
        inside = list(super().parameters(recurse))
        if not inside:
            raise UnsupportedCallError(_not_here(self.name))
        return iter(inside)


class _Skeleton(nn.Module):
    """Common to both kinds of linear. Subclasses say the weight's shape and the numbers of features."""

    name: str
    placed: Tensor
    n_out: int

    def _place(self, name: str, like: Tensor) -> None:
        self.name = name
        # One element that follows the model from device to device and from dtype to dtype, and never into a file.
        self.register_buffer("placed", torch.zeros((), dtype=like.dtype), persistent=False)

    @property
    def weight(self) -> Tensor:
        """Shape, dtype and device of the real weight."""
        shape = self._weight_shape()
        weight = self.placed.expand(shape).as_subclass(SkeletonWeight)
        weight.linear = self.name
        return weight

    @property
    def bias(self) -> None:
        """The cloud's too."""
        return None

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As of `SkeletonPart`."""
        if requires_grad:
            raise UnsupportedCallError(_not_here(self.name))
        return self

    def _weight_shape(self) -> tuple[int, int]:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Says whose it is, for PEFT's own errors, which print the module."""
        return f"{self.name}, which the cloud holds"

    def forward(self, x: Tensor) -> Tensor:
        """Zeros `[..., out]`, whatever `x` `[..., in]` is."""
        return x.new_zeros(*x.shape[:-1], self.n_out)


class SkeletonLinear(_Skeleton, nn.Linear):  # type: ignore[misc, override]  # a weight that cannot be set
    """Stands for an `nn.Linear` of the cloud."""

    def __init__(self, real: nn.Linear, name: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = real.in_features, real.out_features
        self.n_out = real.out_features
        self._place(name, real.weight)

    def _weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features


class SkeletonConv1D(_Skeleton, Conv1D):  # type: ignore[misc]  # transformers' own class has no types
    """Stands for a `Conv1D` of the cloud: a linear with a transposed weight, GPT-2's."""

    def __init__(self, real: Any, name: str) -> None:
        nn.Module.__init__(self)
        self.nx, self.nf = real.nx, real.nf
        self.n_out = real.nf
        self._place(name, real.weight)

    def _weight_shape(self) -> tuple[int, int]:
        return self.nx, self.nf


class SkeletonLayer(nn.Module):
    """A decoder layer of the cloud, with a place for each module of the real one. Subclasses say what a call does.

    Args:
        real: The layer that it stands for.
        path: Path of the list of layers in the whole model, such as `model.layers`.
        index: The layer's index in the whole model.

    Attributes:
        name: The layer's name in the whole model, such as `model.layers.7`.
        index: See above.
    """

    def __init__(self, real: nn.Module, path: str, index: int) -> None:
        super().__init__()
        self.name, self.index = f"{path}.{index}", index
        for part, module in real.named_modules():  # a parent comes before its children
            if part:
                parent, _, leaf = part.rpartition(".")
                self.get_submodule(parent).add_module(leaf, _skeleton_of(module, f"{self.name}.{part}"))

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As of `SkeletonPart`."""
        if requires_grad:
            raise UnsupportedCallError(_not_here(self.name))
        return self


def _skeleton_of(real: nn.Module, name: str) -> nn.Module:
    if isinstance(real, nn.Linear):
        return SkeletonLinear(real, name)
    return SkeletonConv1D(real, name) if isinstance(real, Conv1D) else SkeletonPart(name)


def named_linears(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linears of a real decoder layer, which can be sites, by their names inside it."""
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


def linear_names(layers: nn.Module) -> tuple[str, ...]:
    """The last parts of the names of all linears in these layers, as PEFT's `target_modules` take them."""
    return tuple(sorted({name.rpartition(".")[2] for name, _ in named_linears(layers)}))
