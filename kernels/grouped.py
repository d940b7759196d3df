"""The grouped low-rank product: LoRAs of several tenants, of whatever ranks, over the rows of one batch.

A batch that shares the frozen weights has the rows of a tenant next to each other, and what each tenant adds is a small
product of its own (Chen et al., 2023, "Punica"; Sheng et al., 2023, "S-LoRA").

On a CPU it is a loop over the groups, two `linear`s each, in PEFT's order of operations, so that a tenant's rows and
gradients have the bits that it would get by itself. `torch.nn.functional.grouped_mm` and `torch.bmm` need ranks (and
bmm rows) padded to the largest; in fp32 that gives other bits, and in either dtype it is slower where ranks differ and
groups have more than a few rows. docs/results.md has the figures. On a GPU where Triton runs it is
`isthmus.kernels.grouped_triton`, which adds up in another order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from isthmus.kernels.dispatch import runs_triton


def grouped_low_rank(
    x: Tensor, sizes: Sequence[int], downs: Sequence[Tensor], ups: Sequence[Tensor], scales: Sequence[float]
) -> Tensor:
    """`y[t] = scale · B A x[t]`, with the `A`, `B` and scale of the group that row `t` belongs to.

    Autograd goes through to `x`, every `A` and every `B`. A group may have no rows, whose gradients are zeros, and a
    group of rank 0 gives zeros.

    Args:
        x: `[T, in]`, fp32, bf16 or fp16; other dtypes go through torch. The rows of a group lie next to each other.
        sizes: Rows of each group, in order; they add up to `T`.
        downs: `A` of each group, `[r, in]`, of the dtype of `x`; ranks may differ.
        ups: `B` of each group, `[out, r]`, likewise.
        scales: Of each group.

    Returns:
        `[T, out]`, of the dtype of `x`. On a CPU the rows of a group, and all gradients, are bit for bit those of
        `linear(linear(x_g, A), B) * scale` for that group by itself.

    Raises:
        ValueError: There is no group, or the arguments do not fit each other.
    """
    _check(x, sizes, downs, ups, scales)
    if runs_triton(x):
        from isthmus.kernels import grouped_triton

        return grouped_triton.grouped_low_rank(x, sizes, downs, ups, scales)
    return torch.cat(
        [
            functional.linear(functional.linear(rows, down), up) * scale
            for rows, down, up, scale in zip(torch.split(x, list(sizes)), downs, ups, scales, strict=True)
        ]
    )


def _check(
    x: Tensor, sizes: Sequence[int], downs: Sequence[Tensor], ups: Sequence[Tensor], scales: Sequence[float]
) -> None:
    counts = [len(sizes), len(downs), len(ups), len(scales)]
    if not sizes or len(set(counts)) > 1:
        raise ValueError(f"one size, A, B and scale is needed for each group: got {counts} of them")
    if x.dim() != 2 or min(sizes) < 0 or sum(sizes) != len(x):
        raise ValueError(f"groups of {list(sizes)} rows do not make up an x of shape {list(x.shape)}: it has to be 2-D")
    for group, (down, up) in enumerate(zip(downs, ups, strict=True)):
        rank, out = len(down), len(ups[0])
        if down.shape != (rank, x.shape[1]) or up.shape != (out, rank):
            raise ValueError(
                f"group {group} has A of shape {list(down.shape)} and B of shape {list(up.shape)}: "
                f"[r, {x.shape[1]}] and [{out}, r] are needed"
            )
        if {down.dtype, up.dtype} != {x.dtype}:
            raise ValueError(f"group {group} has A in {down.dtype} and B in {up.dtype}, but x is in {x.dtype}")
