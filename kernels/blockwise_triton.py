"""Block quantization on a GPU: what `isthmus.kernels.blockwise` computes for the wire, in one pass over the memory.

`quantize_int8`, `dequantize_int8`: the bytes of the torch reference. Divisions are rounded as IEEE says, a value half
way between two goes to the even one, and no product is fused into a sum.

`quantize_int4`, `dequantize_int4`: the rotation is a sum of 64 values in fp32, and another order of adding rounds
otherwise. A rotated value moves by at most 64 of fp32's roundings of the block's largest, so now and then a scale is
one step of bf16 off or a value one of its steps, and the error that `blockwise` states still holds.

This module imports Triton; `isthmus.kernels.blockwise` imports it where it is needed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from isthmus.kernels.blockwise import BLOCK, INT4_BYTES, MIN_SCALE, QMAX, SCALE_FACTOR
from isthmus.kernels.dispatch import on_device_of

TILE = 32
"""Blocks that a program works on."""

_HALF = tl.constexpr(BLOCK // 2)
_ENTRY = tl.constexpr(BLOCK**-0.5)
_INT8_LIMIT = tl.constexpr(float(QMAX))
_INT4_LIMIT = tl.constexpr(7.0)
_SCALE_FACTOR = tl.constexpr(SCALE_FACTOR)
_MIN_SCALE = tl.constexpr(MIN_SCALE)
# Added to a value below 2^22 and taken away again, it leaves the nearest integer, ties to even.
_ROUNDER = tl.constexpr(1.5 * 2.0**23)


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """`isthmus.kernels.blockwise.quantize_int8`."""
    x = x.detach().contiguous()
    n = x.shape[-1]
    blocks = -(-n // BLOCK)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((*x.shape[:-1], blocks), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        _quantize_int8_kernel[(triton.cdiv(scale.numel(), TILE),)](
            q, scale, x, scale.numel(), n, blocks, BLOCK,
            width=BLOCK, tile=TILE, enable_fp_fusion=False,
        )  # fmt: skip
    return q, scale


def dequantize_int8(q: Tensor, scale: Tensor) -> Tensor:
    """`isthmus.kernels.blockwise.dequantize_int8`."""
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    with on_device_of(q):
        _dequantize_int8_kernel[(triton.cdiv(scale.numel(), TILE),)](
            out, q.contiguous(), scale.contiguous(), scale.numel(), q.shape[-1], scale.shape[-1], BLOCK,
            width=BLOCK, tile=TILE, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def quantize_int4(x: Tensor) -> tuple[Tensor, Tensor]:
    """`isthmus.kernels.blockwise.quantize_int4`."""
    x = x.detach().contiguous()
    n = x.shape[-1]
    blocks = -(-n // BLOCK)
    q = torch.empty((*x.shape[:-1], blocks * INT4_BYTES), dtype=torch.uint8, device=x.device)
    scale = torch.empty((*x.shape[:-1], blocks), dtype=torch.bfloat16, device=x.device)
    with on_device_of(x):
        _quantize_int4_kernel[(triton.cdiv(scale.numel(), TILE),)](
            q, scale, x, scale.numel(), n, blocks, tile=TILE, enable_fp_fusion=False,
        )  # fmt: skip
    return q, scale


def dequantize_int4(q: Tensor, scale: Tensor, n: int) -> Tensor:
    """`isthmus.kernels.blockwise.dequantize_int4`."""
    out = torch.empty((*q.shape[:-1], n), dtype=torch.float32, device=q.device)
    with on_device_of(q):
        _dequantize_int4_kernel[(triton.cdiv(scale.numel(), TILE),)](
            out, q.contiguous(), scale.contiguous(), scale.numel(), n, scale.shape[-1],
            tile=TILE, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@triton.jit
def _round(value: tl.tensor, limit: tl.tensor) -> tl.tensor:
    """To the nearest integer, ties to even, within ±limit; NaN to the limit."""
    value = tl.where(value <= limit, value, limit)
    value = tl.where(value >= -limit, value, -limit)
    return value + _ROUNDER - _ROUNDER


@triton.jit
def _largest(x: tl.tensor) -> tl.tensor:
    """The bits of the largest absolute value of each row of fp32; those of a NaN are above all others."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)


@triton.jit
def _to_bf16(scale: tl.tensor) -> tl.tensor:
    """Positive fp32 to the nearest of bf16, ties to even, by hand: Triton's interpreter would cut the digits off."""
    bits = scale.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    finite_or_infinite = scale == scale  # noqa: PLR0124
    return tl.where(finite_or_infinite, rounded, bits).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _quantize_int8_kernel(
    q: tl.tensor, scales: tl.tensor, x: tl.tensor,
    count: tl.tensor, n: tl.tensor, blocks: tl.tensor, block: tl.tensor,
    width: tl.constexpr, tile: tl.constexpr,
) -> None:  # fmt: skip
    number = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    place = tl.arange(0, width)
    column = (number % blocks)[:, None] * block + place[None, :]
    there = (number < count)[:, None] & (place < block)[None, :] & (column < n)
    at = (number // blocks)[:, None] * n + column
    value = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    scale = _largest(value).to(tl.float32, bitcast=True) * _SCALE_FACTOR
    scale = tl.where(scale < _MIN_SCALE, _MIN_SCALE, scale)
    tl.store(scales + number, scale, mask=number < count)
    tl.store(q + at, _round(tl.div_rn(value, scale[:, None]), _INT8_LIMIT).to(tl.int8), mask=there)


@triton.jit
def _dequantize_int8_kernel(
    out: tl.tensor, q: tl.tensor, scales: tl.tensor,
    count: tl.tensor, n: tl.tensor, blocks: tl.tensor, block: tl.tensor,
    width: tl.constexpr, tile: tl.constexpr,
) -> None:  # fmt: skip
    number = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    place = tl.arange(0, width)
    column = (number % blocks)[:, None] * block + place[None, :]
    there = (number < count)[:, None] & (place < block)[None, :] & (column < n)
    at = (number // blocks)[:, None] * n + column
    scale = tl.load(scales + number, mask=number < count, other=0.0)
    tl.store(out + at, tl.load(q + at, mask=there, other=0).to(tl.float32) * scale[:, None], mask=there)


@triton.jit
def _hadamard(i: tl.tensor, j: tl.tensor) -> tl.tensor:
    """Entries of Sylvester's matrix: negative where an odd number of bits is set in both indices."""
    both = i & j
    both = both ^ (both >> 4)
    both = both ^ (both >> 2)
    both = both ^ (both >> 1)
    return (1 - 2 * (both & 1)).to(tl.float32) * _ENTRY


@triton.jit
def _quantize_int4_kernel(
    q: tl.tensor, scales: tl.tensor, x: tl.tensor, count: tl.tensor, n: tl.tensor, blocks: tl.tensor,
    tile: tl.constexpr,
) -> None:  # fmt: skip
    number = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    place = tl.arange(0, 2 * _HALF)
    column = (number % blocks)[:, None] * (2 * _HALF) + place[None, :]
    there = (number < count)[:, None] & (column < n)
    value = tl.load(x + (number // blocks)[:, None] * n + column, mask=there, other=0.0).to(tl.float32)
    byte = tl.arange(0, _HALF)
    # Two halves of the matrix: the values of a byte's lower half, and those of its upper half.
    low = tl.dot(value, _hadamard(place[:, None], 2 * byte[None, :]), input_precision="ieee")
    high = tl.dot(value, _hadamard(place[:, None], 2 * byte[None, :] + 1), input_precision="ieee")
    largest = tl.maximum(_largest(low), _largest(high)).to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, tl.full(largest.shape, _INT4_LIMIT, tl.float32))
    scale = _to_bf16(tl.where(scale < _MIN_SCALE, _MIN_SCALE, scale))
    tl.store(scales + number, scale, mask=number < count)
    scale = scale.to(tl.float32)[:, None]
    low = _round(tl.div_rn(low, scale), _INT4_LIMIT).to(tl.int32) + 8
    high = _round(tl.div_rn(high, scale), _INT4_LIMIT).to(tl.int32) + 8
    at = number[:, None] * _HALF + byte[None, :]
    tl.store(q + at, (low | high << 4).to(tl.uint8), mask=(number < count)[:, None] & (byte < _HALF)[None, :])


@triton.jit
def _dequantize_int4_kernel(
    out: tl.tensor, q: tl.tensor, scales: tl.tensor, count: tl.tensor, n: tl.tensor, blocks: tl.tensor,
    tile: tl.constexpr,
) -> None:  # fmt: skip
    number = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    byte = tl.arange(0, _HALF)
    inside = (number < count)[:, None]
    packed = tl.load(q + number[:, None] * _HALF + byte[None, :], mask=inside, other=0).to(tl.int32)
    scale = tl.load(scales + number, mask=number < count, other=0.0).to(tl.float32)[:, None]
    low = ((packed & 15) - 8).to(tl.float32) * scale
    high = ((packed >> 4) - 8).to(tl.float32) * scale
    place = tl.arange(0, 2 * _HALF)
    value = tl.dot(low, _hadamard(2 * byte[:, None], place[None, :]), input_precision="ieee")
    value = tl.dot(high, _hadamard(2 * byte[:, None] + 1, place[None, :]), value, input_precision="ieee")
    column = (number % blocks)[:, None] * (2 * _HALF) + place[None, :]
    tl.store(out + (number // blocks)[:, None] * n + column, value, mask=inside & (column < n))
