"""Block quantization: int8, or int4 packed two in a byte, with one scale per block along the last dimension.

The blocks keep an outlier from spoiling the precision of a whole row: the hidden states of language models have a few
channels that are hundreds of times larger than the others (Dettmers et al., 2022, "LLM.int8()").

With four bits that is not enough. `quantize_int4` rotates each block by a Hadamard matrix first, which spreads what is
large over the whole block, so that the steps between two values suit all of them (Ashkboos et al., 2024, "QuaRot").

Everything here is plain torch, on any device. The four functions of the wire (`quantize_int8`, `quantize_int4` and
their inverses) turn to `isthmus.kernels.blockwise_triton` for a tensor on a GPU, where Triton runs.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from isthmus.kernels.dispatch import runs_triton

BLOCK = 64
QMAX = 127

INT4_BYTES = BLOCK // 2
"""Bytes of a block of `quantize_int4`, its scale not counted."""
INT4_MAX_SCALE = 2.0**120
"""Up to this scale no sum over a block of 4-bit values overflows fp32."""

# A scale is a hair under absmax / 127, so that 127 * scale never rounds to infinity for the largest finite fp32 value.
SCALE_FACTOR = (1.0 - 2.0**-22) / QMAX
# The smallest normal fp32: it keeps the division of zero blocks finite, and of subnormal ones exact enough for the
# bound.
MIN_SCALE = torch.finfo(torch.float32).tiny


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize to int8, symmetric, one scale per 64 neighbours along the last dimension (the last may be shorter).

    For finite `x` the error is bounded: `|x - dequantize_int8(q, scale)| <= scale / 2`, up to fp32 rounding (1e-5 of
    the scale). A NaN or an infinity makes the scale of its block NaN or infinite, so `scale.isfinite().all()` tells
    whether the input was finite.

    Args:
        x: floating tensor `[..., n]`, n >= 1.

    Returns:
        q: int8 `[..., n]`, values in -127..127.
        scale: fp32 `[..., ceil(n / 64)]`, positive.
    """
    if runs_triton(x):
        from isthmus.kernels import blockwise_triton

        return blockwise_triton.quantize_int8(x)
    n = x.shape[-1]
    blocks = -(-n // BLOCK)
    values = x.detach().to(torch.float32)
    if blocks * BLOCK != n:
        values = pad(values, (0, blocks * BLOCK - n))
    values = values.reshape(-1, BLOCK)  # [rows * blocks, 64]
    scale = values.abs().amax(-1, keepdim=True).mul_(SCALE_FACTOR).clamp_(min=MIN_SCALE)
    # The division is out of place: `values` may share the caller's memory.
    q = values.div(scale).round_().clamp_(-QMAX, QMAX).to(torch.int8)
    q = q.view(*x.shape[:-1], blocks * BLOCK)[..., :n]
    return q.contiguous(), scale.view(*x.shape[:-1], blocks)


def dequantize_int8(q: Tensor, scale: Tensor) -> Tensor:
    """Invert `quantize_int8`.

    Args:
        q: int8 `[..., n]`.
        scale: fp32 `[..., ceil(n / 64)]`.

    Returns:
        fp32 `[..., n]`, newly allocated.
    """
    if runs_triton(scale):
        from isthmus.kernels import blockwise_triton

        return blockwise_triton.dequantize_int8(q, scale)
    n = q.shape[-1]
    blocks = -(-n // BLOCK)
    if blocks * BLOCK != n:
        q = pad(q, (0, blocks * BLOCK - n))
    # Converting first and multiplying in place is many times faster than the mixed product int8 * fp32.
    values = q.reshape(-1, BLOCK).to(torch.float32).mul_(scale.reshape(-1, 1))
    return values.view(*q.shape[:-1], blocks * BLOCK)[..., :n].contiguous()


def quantize_weight(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantize a weight for a file: symmetric, one scale per 64 neighbours along the last dimension.

    Scales are rounded to bf16, so that a value times its scale is exact in fp32: quantizing what `dequantize_weight`
    gives back changes nothing. For finite `x` below 1e38 the error is at most half a scale, up to fp32 rounding. A NaN
    or an infinity makes the scale of its block NaN or infinite.

    Args:
        x: floating tensor `[..., n]`, n >= 1.
        bits: 8 or 4.

    Returns:
        q: with 8 bits int8 `[..., n]`, values in -127..127; with 4 bits uint8 `[..., ceil(n / 2)]`, two values in
            -7..7 a byte, each plus 8, the earlier in the lower half.
        scale: bf16 `[..., ceil(n / 64)]`, positive.
    """
    n = x.shape[-1]
    blocks = -(-n // BLOCK)
    limit = 2 ** (bits - 1) - 1
    values = pad(x.detach().to(torch.float32), (0, blocks * BLOCK - n)).reshape(-1, BLOCK)  # [rows * blocks, 64]
    scale = values.abs().amax(-1, keepdim=True).div_(limit).clamp_(min=MIN_SCALE).to(torch.bfloat16)
    rounded = values.div(scale.float()).round_().clamp_(-limit, limit).to(torch.int8)
    q = rounded.view(*x.shape[:-1], blocks * BLOCK)[..., :n]
    scale = scale.view(*x.shape[:-1], blocks)
    return (_pack(q) if bits == 4 else q.contiguous()), scale


def dequantize_weight(q: Tensor, scale: Tensor, n: int, bits: int) -> Tensor:
    """Invert `quantize_weight`.

    Args:
        q: what `quantize_weight` returned.
        scale: bf16 `[..., ceil(n / 64)]`.
        n: length of the weight's last dimension.
        bits: 8 or 4.

    Returns:
        fp32 `[..., n]`, newly allocated.
    """
    values = _unpack(q)[..., :n] if bits == 4 else q
    return dequantize_int8(values, scale.to(torch.float32))


def quantize_int4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate each block of 64 neighbours along the last dimension, and quantize it to four bits, symmetric.

    A last block that is shorter is filled with zeros and takes as many bytes as the others. The rotation is orthogonal,
    so the error of a block has the norm that it has before it is rotated back: at most `4 * scale`, for 64 values that
    are half a scale off. Scales are bf16 because they need fp32's range: those of a gradient are often below what fp16
    can tell from zero. The values are divided by the rounded scale, so its few digits cost no precision.

    For finite `x` below 1e36 a scale is at most `INT4_MAX_SCALE`. A NaN or an infinity makes the scale of its block NaN
    or infinite.

    Args:
        x: floating tensor `[..., n]`, n >= 1.

    Returns:
        q: uint8 `[..., blocks * INT4_BYTES]`, blocks = ceil(n / 64), packed as by `quantize_weight`.
        scale: bf16 `[..., blocks]`, positive.
    """
    if runs_triton(x):
        from isthmus.kernels import blockwise_triton

        return blockwise_triton.quantize_int4(x)
    n = x.shape[-1]
    return quantize_weight(_rotate(pad(x.detach().to(torch.float32), (0, -n % BLOCK))), 4)


def dequantize_int4(q: Tensor, scale: Tensor, n: int) -> Tensor:
    """Invert `quantize_int4`.

    Args:
        q: what `quantize_int4` returned, or any bytes of this shape.
        scale: bf16 `[..., blocks]`, of at most `INT4_MAX_SCALE`; larger ones may give NaN or infinity.
        n: length of the tensor's last dimension.

    Returns:
        fp32 `[..., n]`, newly allocated.
    """
    if runs_triton(scale):
        from isthmus.kernels import blockwise_triton

        return blockwise_triton.dequantize_int4(q, scale, n)
    return _rotate(dequantize_weight(q, scale, q.shape[-1] * 2, 4))[..., :n].contiguous()


def _rotate(x: Tensor) -> Tensor:
    """Multiply each block of the last dimension by the Hadamard matrix, which is its own inverse.

    A trainer's autocast would multiply in half precision.
    """
    with torch.autocast(x.device.type, enabled=False):
        return (x.reshape(-1, BLOCK) @ _hadamard().to(x.device)).view(x.shape)


@cache
def _hadamard() -> Tensor:
    """The orthonormal Hadamard matrix `[64, 64]` of Sylvester, symmetric, all entries 1/8 or -1/8."""
    matrix = torch.full((1, 1), BLOCK**-0.5, device="cpu", dtype=torch.float32)
    while len(matrix) < BLOCK:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _pack(q: Tensor) -> Tensor:
    """int8 `[..., n]` in -8..7 -> uint8 `[..., ceil(n / 2)]`."""
    halves = pad(q, (0, q.shape[-1] % 2)).add(8).to(torch.uint8)
    return halves[..., 0::2] | halves[..., 1::2] << 4


def _unpack(packed: Tensor) -> Tensor:
    """uint8 `[..., m]` -> int8 `[..., 2 * m]` in -8..7."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2).to(torch.int8).sub(8)
