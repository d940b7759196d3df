"""Frozen linears in fewer bits, by bitsandbytes' arithmetic.

    int8   one scale for each output, symmetric, as in LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), of the
           weights alone: 1 byte a weight
    nf4    blocks of 64 in the 16 values of NF4, with scales that are quantized too, as in QLoRA (Dettmers et al. 2023,
           arXiv 2305.14314): 0.52 bytes a weight

A product is one of the dequantized weight, in the dtype of the input, and its gradient goes to the input alone. The
backward dequantizes again: a graph that kept the dequantized weights would hold the whole span in full precision for as
long as a call waits for its backward. Norms, biases, embeddings and the head stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from isthmus.backbone.checkpoints.span_format import NONE, check_quantizer
from isthmus.backbone.skeleton import named_linears

_NF4_BLOCK, _SCALE_BLOCK = 64, 256

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Quantizer:
    """One way to hold a weight in fewer bits.

    Attributes:
        pack: A weight `[out, in]` as small tensors, by name.
        dense: The inverse: small tensors, shape and dtype of the weight.
        empty: The shapes and dtypes of the small tensors, for a shape of the weight.
    """

    name: str
    pack: Callable[[Tensor], Tensors]
    dense: Callable[[Tensors, torch.Size, torch.dtype], Tensor]
    empty: Callable[[torch.Size], Mapping[str, tuple[tuple[int, ...], torch.dtype]]]


def largest_weight(module: nn.Module) -> int:
    """Numbers of the largest quantized weight in a module, which a product needs in full; 0 without any."""
    return max((m.in_features * m.out_features for m in module.modules() if isinstance(m, QuantizedLinear)), default=0)


class QuantizedLinear(nn.Linear):
    """A frozen linear whose weight is held in small tensors, as buffers.

    Args:
        shape: `[out, in]`.
        tensors: What `quantizer.pack` made of the weight.
        bias: `[out]`, or None.
    """

    def __init__(
        self, quantizer: Quantizer, shape: torch.Size, dtype: torch.dtype, tensors: Tensors, bias: Tensor | None
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.quantizer = quantizer
        self.dtype = dtype
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # nn.Linear's is a parameter
        """The dequantized weight `[out, in]`, computed anew at each call."""
        shape = torch.Size((self.out_features, self.in_features))
        return self.quantizer.dense(dict(self.named_buffers(recurse=False)), shape, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., out]` of `[..., in]`. Keeps nothing for the backward, which dequantizes again."""
        result: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]  # torch
        return result


class _Product(torch.autograd.Function):
    """`x W^T + b` with a gradient for `x` alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantizedLinear) -> Tensor:
        ctx.linear = linear
        return functional.linear(x, linear.weight, linear.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.linear.weight, None


# The two ways ---------------------------------------------------------------------------------------------------------


def _int8(weight: Tensor) -> Tensors:
    whole, largest, _ = _bitsandbytes().int8_vectorwise_quant(weight.contiguous())
    return {"whole": whole, "largest": largest}


def _from_int8(tensors: Tensors, _shape: torch.Size, dtype: torch.dtype) -> Tensor:
    result: Tensor = _bitsandbytes().int8_vectorwise_dequant(tensors["whole"], tensors["largest"]).to(dtype)
    return result


def _empty_int8(shape: torch.Size) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
    return {"whole": (tuple(shape), torch.int8), "largest": ((shape[0],), torch.float32)}


def _nf4(weight: Tensor) -> Tensors:
    data, state = _bitsandbytes().quantize_4bit(
        weight.reshape(-1), blocksize=_NF4_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return {
        "data": data,
        "absmax": state.absmax,
        "code": state.code,
        "offset": state.offset,
        "nested_absmax": state.state2.absmax,
        "nested_code": state.state2.code,
    }


def _from_nf4(tensors: Tensors, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    bnb = _bitsandbytes()
    nested = bnb.QuantState(
        tensors["nested_absmax"], blocksize=_SCALE_BLOCK, code=tensors["nested_code"], dtype=torch.float32
    )
    # Flat, as it was packed: of a matrix whose width is no multiple of a block, bitsandbytes (0.50) takes the wrong
    # scales on a CPU.
    flat = torch.Size((shape.numel(),))
    state = bnb.QuantState(
        tensors["absmax"], flat, tensors["code"], _NF4_BLOCK, "nf4", dtype, tensors["offset"], nested
    )
    result: Tensor = bnb.dequantize_4bit(tensors["data"], state)
    return result.reshape(shape)


def _empty_nf4(shape: torch.Size) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
    blocks = -(-shape.numel() // _NF4_BLOCK)
    return {
        "data": (((shape.numel() + 1) // 2, 1), torch.uint8),
        "absmax": ((blocks,), torch.uint8),
        "code": ((16,), torch.float32),
        "offset": ((), torch.float32),
        "nested_absmax": ((-(-blocks // _SCALE_BLOCK),), torch.float32),
        "nested_code": ((256,), torch.float32),
    }


QUANTIZERS: Mapping[str, Quantizer] = {
    "int8": Quantizer("int8", _int8, _from_int8, _empty_int8),
    "nf4": Quantizer("nf4", _nf4, _from_nf4, _empty_nf4),
}


def _bitsandbytes() -> Any:
    from bitsandbytes import functional

    return functional


# Layers ---------------------------------------------------------------------------------------------------------------


def quantizer_of(name: str) -> Quantizer | None:
    """The quantizer of a name; None for "none".

    Raises:
        ConfigError: There is none of this name, or bitsandbytes is not installed.
    """
    check_quantizer(name)
    return None if name == NONE else QUANTIZERS[name]


def quantize_linears(layer: nn.Module, quantizer: Quantizer) -> None:
    """Put a quantized linear in the place of every linear of a decoder layer, one after another.

    GPT-2's `Conv1D`s become linears. On the meta device the small tensors are there to be read from a file.
    """
    linear: Any
    for name, linear in list(named_linears(layer)):
        weight, bias = weight_of(linear), linear.bias
        if weight.is_meta:
            forms = quantizer.empty(weight.shape)
            tensors = {key: torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in forms.items()}
        else:
            with torch.no_grad():
                tensors = quantizer.pack(weight)
        parent, _, leaf = name.rpartition(".")
        quantized = QuantizedLinear(quantizer, weight.shape, weight.dtype, tensors, bias)
        setattr(layer.get_submodule(parent), leaf, quantized)


def weight_of(linear: Any) -> Tensor:
    """A linear's weight `[out, in]`: a `Conv1D` stores the transpose."""
    weight: Tensor = linear.weight.detach()
    return weight.T if isinstance(linear, Conv1D) else weight


def features_of(linear: Any) -> tuple[int, int]:
    """Widths of a linear's input and output."""
    return (linear.nx, linear.nf) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)


def bytes_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, each piece of memory once."""
    storages = (tensor.untyped_storage() for tensor in (*module.parameters(), *module.buffers()))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
