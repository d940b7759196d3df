"""Block quantization: int8 with one fp32 scale per block along the last dimension.

The blocks keep an outlier from spoiling the precision of a whole row: the hidden states of language models have a few
channels that are hundreds of times larger than the others (Dettmers et al., 2022, "LLM.int8()").
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 64
QMAX = 127

# A scale is a hair under absmax / 127, so that 127 * scale never rounds to infinity for the largest finite fp32 value.
_SCALE_FACTOR = (1.0 - 2.0**-22) / QMAX
# The smallest normal fp32: it keeps the division of zero blocks finite, and of subnormal ones exact enough for the
# bound.
_MIN_SCALE = torch.finfo(torch.float32).tiny


def quantize_int8(x: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Quantize to int8, symmetric, one scale per `block` neighbours along the last dimension (the last may be shorter).

    For finite `x` the error is bounded: `|x - dequantize_int8(q, scale)| <= scale / 2`, up to fp32 rounding (1e-5 of
    the scale). A NaN or an infinity makes the scale of its block NaN or infinite, so `scale.isfinite().all()` tells
    whether the input was finite.

    Args:
        x: floating tensor `[..., n]`, n >= 1.
        block: neighbours that share a scale.

    Returns:
        q: int8 `[..., n]`, values in -127..127.
        scale: fp32 `[..., ceil(n / block)]`, positive.
    """
    n = x.shape[-1]
    blocks = -(-n // block)
    values = x.detach().to(torch.float32)
    if blocks * block != n:
        values = pad(values, (0, blocks * block - n))
    values = values.reshape(-1, block)  # [rows * blocks, block]
    scale = values.abs().amax(-1, keepdim=True).mul_(_SCALE_FACTOR).clamp_(min=_MIN_SCALE)
    # The division is out of place: `values` may share the caller's memory.
    q = values.div(scale).round_().clamp_(-QMAX, QMAX).to(torch.int8)
    q = q.view(*x.shape[:-1], blocks * block)[..., :n]
    return q.contiguous(), scale.view(*x.shape[:-1], blocks)


def dequantize_int8(q: Tensor, scale: Tensor, block: int = BLOCK) -> Tensor:
    """Invert `quantize_int8`.

    Args:
        q: int8 `[..., n]`.
        scale: fp32 `[..., ceil(n / block)]`.
        block: the block size of the quantization.

    Returns:
        fp32 `[..., n]`, newly allocated.
    """
    n = q.shape[-1]
    blocks = -(-n // block)
    if blocks * block != n:
        q = pad(q, (0, blocks * block - n))
    # Converting first and multiplying in place is many times faster than the mixed product int8 * fp32.
    values = q.reshape(-1, block).to(torch.float32).mul_(scale.reshape(-1, 1))
    return values.view(*q.shape[:-1], blocks * block)[..., :n].contiguous()
