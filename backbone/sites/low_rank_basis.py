"""The frozen matrices `A` and `B` of a low-rank site. Where they come from is the user's choice:

    seeded  random numbers that both sides derive from a seed and the site's name. They say nothing of `W`, and the edge
            can export the adapter by itself. Directions are arbitrary, so it may take a larger rank for the same loss.
    svd     from the truncated SVD of `W`, as in LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604): the directions that
            `W` uses most. The cloud computes them. The edge needs them for an export only, and whoever has them has
            `B A`, the best approximation of `W` of rank `r`: the cloud decides whether to hand them out.

Seeded ones keep the size of the numbers, while `B` from an SVD carries the singular values: a learning rate that suits
one need not suit the other.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.backbone.checkpoints.weight_quantization import features_of, weight_of
from isthmus.common.errors import ConfigError

INITS = ("seeded", "svd")
BasisMatrices = tuple[Tensor, Tensor]
"""`A` `[r, in]` and `B` `[out, r]`."""


def seeded_matrix(label: str, rows: int, columns: int) -> Tensor:
    """Random numbers `[rows, columns]`, fp32, on the CPU: the same bits wherever they are derived from `label`.

    They are uniform with mean 0 and variance `1 / columns`, so that the product with a vector keeps the size of its
    numbers. Bits of SHAKE-256 become numbers by steps that are exact or rounded once. torch's generators
    promise no such thing: releases differ, normal numbers pass through vectorised logarithms.
    """
    stream = hashlib.shake_256(label.encode()).digest(4 * rows * columns)
    whole = np.frombuffer(stream, dtype="<i4") >> 8  # 24 bits, which fp32 holds exactly
    step = np.float32(math.sqrt(3 / columns) / 2**23)
    return torch.from_numpy((whole.astype(np.float32) * step).reshape(rows, columns))


def low_rank_basis(name: str, in_features: int, out_features: int, rank: int, seed: int) -> BasisMatrices:
    """`A` and `B` of a site from a seed, the same bits for both sides.

    `A x` has about the variance of `x` a number, and `B u` that of `u`; see `seeded_matrix`. PrivateLoRA's own code
    draws both uniformly too, at a third of that variance. Orthonormal ones would come out of a factorisation, whose
    last bits differ between machines.

    Args:
        name: The site, in full, such as `model.layers.7.self_attn.q_proj`.
        in_features, out_features: Widths of its input and its output.
        rank: `r`.
        seed: 0 or more.

    Raises:
        ConfigError: The rank does not fit the site.
    """
    check_rank(name, rank, in_features, out_features)
    down = seeded_matrix(f"isthmus low-rank A\n{seed}\n{name}", rank, in_features)
    up = seeded_matrix(f"isthmus low-rank B\n{seed}\n{name}", out_features, rank)
    return down, up


def svd_basis(weight: Tensor, rank: int) -> BasisMatrices:
    """`A = V^T` and `B = U S` of a site from its weight `W ~ U S V^T`, as in LoRA-XS (Bałazy et al. 2024).

    Each pair of singular vectors is turned so that the largest number of its row of `A` is positive, and the SVD is
    computed in fp64 on the CPU. So the result is the same on the same machine and threads, and nearly so elsewhere,
    unless two singular values are equal.

    Args:
        weight: `W [out, in]`; a `Conv1D` stores the transpose.
        rank: `r`.

    Returns:
        `A [r, in]` and `B [out, r]`, fp32, on the CPU. Whoever gets both knows `B A`, `W`'s best approximation of rank
        `r`.

    Raises:
        ConfigError: The rank does not fit the weight.
    """
    n_out, n_in = weight.shape
    check_rank("the weight", rank, n_in, n_out)
    left, values, right = torch.linalg.svd(weight.detach().to("cpu", torch.float64), full_matrices=False)
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    largest = right.gather(1, right.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(right.dtype)
    return (right * signs).float().contiguous(), (left * values * signs.T).float().contiguous()


def site_basis(name: str, linear: nn.Module, *, rank: int, seed: int, init: str) -> BasisMatrices:
    """`A` and `B` of a site whose weight is at hand, in the cloud's span or in a whole model; see `LowRankAdapter`.

    Args:
        name: The site, in full.
        linear: The real `nn.Linear` or `Conv1D`.
        rank, seed, init: As the adapter has them.

    Raises:
        ConfigError: The rank does not fit the site.
    """
    if init == "svd":
        return svd_basis(weight_of(linear), rank)
    return low_rank_basis(name, *features_of(linear), rank, seed)


def check_rank(name: str, rank: int, n_in: int, n_out: int) -> None:
    """Raise `ConfigError` unless the rank fits a site with these widths."""
    if not 1 <= rank <= min(n_in, n_out):
        raise ConfigError(
            f"rank {rank} does not fit {name}, which has {n_in} inputs and {n_out} outputs: use 1 to {min(n_in, n_out)}"
        )
