"""Linear weights in few bits, in an emulator's file.

The file is small and the emulator lossy; memory is as it was: a reader gets dense weights of the quantized values.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from isthmus.backbone.skeleton import named_linears
from isthmus.emulator.compress.svd import LowRankLinear
from isthmus.kernels.blockwise import BLOCK, dequantize_weight, quantize_weight

_STORED = {8: torch.int8, 4: torch.uint8}


def quantized_names(layer: nn.Module) -> frozenset[str]:
    """Names, inside a decoder layer, of the weights that are quantized: those of linear layers and of their factors."""
    whole = {f"{name}.weight" for name, _ in named_linears(layer)}
    factors = {
        f"{name}.{factor}"
        for name, module in layer.named_modules()
        if isinstance(module, LowRankLinear)
        for factor in ("down", "up")
    }
    return frozenset(whole | factors)


def stored_names(name: str, bits: int) -> tuple[str, str]:
    """What a quantized weight and its scales are called in the file."""
    return f"{name}.int{bits}", f"{name}.scale"


def stored_forms(name: str, shape: torch.Size, bits: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes, by their names in the file, of what stands for a weight of `shape`."""
    *rows, n = shape
    values, scale = stored_names(name, bits)
    return {
        values: ((*rows, n if bits == 8 else -(-n // 2)), _STORED[bits]),
        scale: ((*rows, -(-n // BLOCK)), torch.bfloat16),
    }


def to_stored(name: str, weight: Tensor, bits: int) -> dict[str, Tensor]:
    """Quantize a weight; returns what the file holds for it, by name."""
    return dict(zip(stored_names(name, bits), quantize_weight(weight, bits), strict=True))


def from_stored(name: str, stored: Mapping[str, Tensor], n: int, bits: int) -> Tensor:
    """The weight, fp32 `[..., n]`, that stands in the file under `name`."""
    values, scale = (stored[each] for each in stored_names(name, bits))
    return dequantize_weight(values, scale, n, bits)


def round_weight(weight: Tensor, bits: int) -> Tensor:
    """The weight as a reader will have it, in its own dtype."""
    values, scale = quantize_weight(weight, bits)
    return dequantize_weight(values, scale, weight.shape[-1], bits).to(weight.dtype)
