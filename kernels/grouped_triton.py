"""The grouped low-rank product on a GPU: three Triton kernels, which the forward and the backward share.

With the groups' matrices packed along their ranks (offset `o` and rank `r` of a group), and `t` the rows of a group:

    shrink   out[t, j] = scale * sum_k x[t, k] W[o + j, k]            j < r     A x, and B^T of the output's gradient
    expand   out[t, k] = scale * sum_j h[t, j] W[o + j, k]            all k     B h, and A^T of h's gradient
    outer    out[o + j, k] = scale * sum_t h[t, j] x[t, k]            j < r     the gradients of A and of B

Strides say how `W` lies, so `B`, which is packed as `[out, ranks]`, needs no transposed copy. A tile of rows belongs to
one group, as in Punica's SGMV; a group's last tile is masked. Sums are fp32, products of fp32 are not rounded to TF32.

This module imports Triton; `isthmus.kernels.grouped` imports it where it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from isthmus.kernels.dispatch import on_device_of

ROWS = 32
COLUMNS = 64
MAX_RANKS = 64
"""Rows, columns and ranks of a tile; larger ranks take several."""

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def grouped_low_rank(
    x: Tensor, sizes: Sequence[int], downs: Sequence[Tensor], ups: Sequence[Tensor], scales: Sequence[float]
) -> Tensor:
    """`isthmus.kernels.grouped.grouped_low_rank`, whose arguments are checked, in fp32, bf16 or fp16."""
    ranks = tuple(down.shape[0] for down in downs)
    plan = _plan(tuple(sizes), ranks, tuple(scales), x.device)
    result: Tensor = _GroupedLowRank.apply(x, plan, *downs, *ups)  # type: ignore[no-untyped-call]  # torch
    return result


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """How the rows of a call are cut.

    Attributes:
        ranks: Of each group.
        groups: int32 `[groups, 4]`: first row, row behind the last, first packed rank, rank.
        tiles: int32 `[tiles, 2]`: group, first row.
        scales: fp32 `[groups]`.
        ones: fp32 `[groups]`, for what is not scaled.
    """

    ranks: tuple[int, ...]
    groups: Tensor
    tiles: Tensor
    scales: Tensor
    ones: Tensor

    @property
    def block(self) -> int:
        """Ranks of a tile."""
        return min(MAX_RANKS, max(16, int(triton.next_power_of_2(max(self.ranks)))))

    @property
    def rank_tiles(self) -> int:
        return -(-max(self.ranks) // self.block)


@lru_cache(maxsize=256)  # all sites of a pass have the same rows
def _plan(sizes: tuple[int, ...], ranks: tuple[int, ...], scales: tuple[float, ...], device: torch.device) -> _Plan:
    groups, tiles = [], []
    row = offset = 0
    for group, (size, rank) in enumerate(zip(sizes, ranks, strict=True)):
        groups.append((row, row + size, offset, rank))
        tiles += [(group, first) for first in range(row, row + size, ROWS)]
        row, offset = row + size, offset + rank
    return _Plan(
        ranks,
        torch.tensor(groups, dtype=torch.int32, device=device),
        torch.tensor(tiles, dtype=torch.int32, device=device).reshape(-1, 2),
        torch.tensor(scales, dtype=torch.float32, device=device),
        torch.ones(len(scales), dtype=torch.float32, device=device),
    )


class _GroupedLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan, *weights: Tensor) -> Tensor:
        x = x.contiguous()
        count = len(plan.ranks)
        down = torch.cat(weights[:count])  # [ranks, in]
        up = torch.cat(weights[count:], 1)  # [out, ranks]
        with on_device_of(x):
            h = _shrink(x, down, plan, plan.ones)
            y = _expand(h, up.T, plan, plan.scales)
        ctx.save_for_backward(x, down, up, h)
        ctx.plan = plan
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, h = ctx.saved_tensors
        plan: _Plan = ctx.plan
        count = len(plan.ranks)
        wanted: tuple[bool, ...] = ctx.needs_input_grad
        gradient = gradient.contiguous()
        of_x: Tensor | None = None
        of_downs: Sequence[Tensor | None] = [None] * count
        of_ups: Sequence[Tensor | None] = [None] * count
        with on_device_of(x):
            if any(wanted[2 + count :]):
                of_up = torch.empty_like(up)
                _outer(h, gradient, of_up.T, plan, plan.scales)
                of_ups = torch.split(of_up, list(plan.ranks), 1)
            if any(wanted[: 2 + count]):
                of_h = _shrink(gradient, up.T, plan, plan.scales)
                if wanted[0]:
                    of_x = _expand(of_h, down, plan, plan.ones)
                if any(wanted[2 : 2 + count]):
                    of_down = torch.empty_like(down)
                    _outer(of_h, x, of_down, plan, plan.ones)
                    of_downs = torch.split(of_down, list(plan.ranks))
        return of_x, None, *of_downs, *of_ups


def _shrink(x: Tensor, weight: Tensor, plan: _Plan, scales: Tensor) -> Tensor:
    """`x` `[T, k]`, `weight` `[ranks, k]` -> `[T, largest rank]`, of which a group writes the first of its rank."""
    h = x.new_empty(len(x), max(plan.ranks))
    grid = (len(plan.tiles), plan.rank_tiles)
    _shrink_kernel[grid](
        h, x, weight, scales, plan.groups, plan.tiles,
        x.shape[1], h.shape[1], *weight.stride(),
        block_t=ROWS, block_r=plan.block, block_k=COLUMNS, enable_fp_fusion=True,
    )  # fmt: skip
    return h


def _expand(h: Tensor, weight: Tensor, plan: _Plan, scales: Tensor) -> Tensor:
    """`h` as of `_shrink`, `weight` `[ranks, k]` -> `[T, k]`."""
    out = h.new_empty(len(h), weight.shape[1])
    grid = (len(plan.tiles), triton.cdiv(out.shape[1], COLUMNS))
    _expand_kernel[grid](
        out, h, weight, scales, plan.groups, plan.tiles,
        out.shape[1], h.shape[1], *weight.stride(),
        block_t=ROWS, block_r=plan.block, block_k=COLUMNS, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _outer(h: Tensor, x: Tensor, out: Tensor, plan: _Plan, scales: Tensor) -> None:
    """`h` as of `_shrink`, `x` `[T, k]` -> `out` `[ranks, k]`."""
    grid = (len(plan.ranks), plan.rank_tiles, triton.cdiv(x.shape[1], COLUMNS))
    _outer_kernel[grid](
        out, h, x, scales, plan.groups,
        x.shape[1], h.shape[1], *out.stride(),
        block_t=ROWS, block_r=plan.block, block_k=COLUMNS, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor, total: tl.tensor) -> tl.tensor:
    if _INTERPRETED:  # Triton's interpreter multiplies the bits of bf16 as if they were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _shrink_kernel(
    out: tl.tensor, x: tl.tensor, weight: tl.tensor, scales: tl.tensor, groups: tl.tensor, tiles: tl.tensor,
    columns: tl.tensor, width: tl.tensor, rank_stride: tl.tensor, column_stride: tl.tensor,
    block_t: tl.constexpr, block_r: tl.constexpr, block_k: tl.constexpr,
) -> None:  # fmt: skip
    group = tl.load(tiles + 2 * tl.program_id(0))
    rows = tl.load(tiles + 2 * tl.program_id(0) + 1) + tl.arange(0, block_t).to(tl.int64)
    there = (rows < tl.load(groups + 4 * group + 1))[:, None]
    offset = tl.load(groups + 4 * group + 2)
    ranks = tl.program_id(1) * block_r + tl.arange(0, block_r)
    has = (ranks < tl.load(groups + 4 * group + 3))[None, :]
    total = tl.zeros((block_t, block_r), tl.float32)
    for start in range(0, columns, block_k):
        ks = start + tl.arange(0, block_k)
        inside = ks < columns
        a = tl.load(x + rows[:, None] * columns + ks[None, :], mask=there & inside[None, :], other=0.0)
        places = (offset + ranks)[None, :] * rank_stride + ks[:, None] * column_stride
        w = tl.load(weight + places, mask=has & inside[:, None], other=0.0)
        total = _dot(a, w, total)
    total = total * tl.load(scales + group)
    tl.store(out + rows[:, None] * width + ranks[None, :], total.to(out.dtype.element_ty), mask=there & has)


@triton.jit
def _expand_kernel(
    out: tl.tensor, h: tl.tensor, weight: tl.tensor, scales: tl.tensor, groups: tl.tensor, tiles: tl.tensor,
    columns: tl.tensor, width: tl.tensor, rank_stride: tl.tensor, column_stride: tl.tensor,
    block_t: tl.constexpr, block_r: tl.constexpr, block_k: tl.constexpr,
) -> None:  # fmt: skip
    group = tl.load(tiles + 2 * tl.program_id(0))
    rows = tl.load(tiles + 2 * tl.program_id(0) + 1) + tl.arange(0, block_t).to(tl.int64)
    there = (rows < tl.load(groups + 4 * group + 1))[:, None]
    offset = tl.load(groups + 4 * group + 2)
    rank = tl.load(groups + 4 * group + 3)
    ks = tl.program_id(1) * block_k + tl.arange(0, block_k)
    inside = (ks < columns)[None, :]
    total = tl.zeros((block_t, block_k), tl.float32)
    for start in range(0, rank, block_r):
        ranks = start + tl.arange(0, block_r)
        has = ranks < rank
        a = tl.load(h + rows[:, None] * width + ranks[None, :], mask=there & has[None, :], other=0.0)
        places = (offset + ranks)[:, None] * rank_stride + ks[None, :] * column_stride
        w = tl.load(weight + places, mask=has[:, None] & inside, other=0.0)
        total = _dot(a, w, total)
    total = total * tl.load(scales + group)
    tl.store(out + rows[:, None] * columns + ks[None, :], total.to(out.dtype.element_ty), mask=there & inside)


@triton.jit
def _outer_kernel(
    out: tl.tensor, h: tl.tensor, x: tl.tensor, scales: tl.tensor, groups: tl.tensor,
    columns: tl.tensor, width: tl.tensor, rank_stride: tl.tensor, column_stride: tl.tensor,
    block_t: tl.constexpr, block_r: tl.constexpr, block_k: tl.constexpr,
) -> None:  # fmt: skip
    group = tl.program_id(0)
    first = tl.load(groups + 4 * group)
    last = tl.load(groups + 4 * group + 1)
    offset = tl.load(groups + 4 * group + 2)
    ranks = tl.program_id(1) * block_r + tl.arange(0, block_r)
    has = ranks < tl.load(groups + 4 * group + 3)
    ks = tl.program_id(2) * block_k + tl.arange(0, block_k)
    inside = (ks < columns)[None, :]
    total = tl.zeros((block_r, block_k), tl.float32)
    for start in range(first, last, block_t):
        rows = start + tl.arange(0, block_t).to(tl.int64)
        there = rows < last
        a = tl.load(h + rows[None, :] * width + ranks[:, None], mask=there[None, :] & has[:, None], other=0.0)
        b = tl.load(x + rows[:, None] * columns + ks[None, :], mask=there[:, None] & inside, other=0.0)
        total = _dot(a, b, total)
    total = total * tl.load(scales + group)
    places = (offset + ranks)[:, None] * rank_stride + ks[None, :] * column_stride
    tl.store(out + places, total.to(out.dtype.element_ty), mask=has[:, None] & inside)
