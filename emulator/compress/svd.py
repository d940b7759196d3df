"""Linear layers as the product of two smaller ones, by truncated singular value decomposition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from isthmus.backbone.checkpoints.weight_quantization import weight_of
from isthmus.backbone.skeleton import named_linears


class LowRankLinear(nn.Module):
    """`x -> up (down x) + bias`, in the place of a linear layer.

    Attributes:
        down: `[rank, inputs]`.
        up: `[outputs, rank]`.
        bias: `[outputs]` or None.
    """

    def __init__(self, down: Tensor, up: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """`[..., inputs]` -> `[..., outputs]`."""
        return linear(linear(x, self.down), self.up, self.bias)


def _rank_of(linear: Any, share: float) -> int | None:
    """The rank `max(1, round(share * min(outputs, inputs)))`; None where the two factors would not be smaller."""
    rows, columns = linear.weight.shape
    rank = max(1, round(share * min(rows, columns)))
    return rank if rank * (rows + columns) < rows * columns else None


def replace_linears(layer: nn.Module, share: float) -> None:
    """Replace the linear layers of a decoder layer, in place, by their best approximations of a lower rank.

    The singular values go to both factors in equal parts, so that both can be trained at one learning rate. On the
    meta device the factors have shapes only.

    Args:
        share: Rank as a share of the smaller side, between 0 and 1.
    """
    for name, module in list(named_linears(layer)):
        rank = _rank_of(module, share)
        if rank is None:
            continue
        down, up = _factors(weight_of(module), rank)
        path, _, leaf = name.rpartition(".")
        bias: Any = module.bias
        setattr(layer.get_submodule(path), leaf, LowRankLinear(down, up, bias))


def _factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    outputs, inputs = weight.shape
    if weight.device.type == "meta":
        return weight.new_empty(rank, inputs), weight.new_empty(outputs, rank)
    u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    root = s[:rank].sqrt()
    down, up = root.unsqueeze(1) * vh[:rank], u[:, :rank] * root
    return down.to(weight.dtype).contiguous(), up.to(weight.dtype).contiguous()
