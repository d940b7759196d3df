"""The LoRAs that edges have leased to the cloud: what those of several calls add at a linear, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.backbone.sites.leasing import LeasedLora
from isthmus.kernels.grouped import grouped_low_rank


@dataclass(frozen=True, slots=True)
class LoraGradients:
    """The gradients of a LoRA's input `[N, in]`, of its `A` and of its `B`; None for a matrix that is not trained."""

    x: Tensor
    down: Tensor | None
    up: Tensor | None


def contributions(loras: Sequence[LeasedLora], rows: Sequence[Tensor]) -> list[Tensor]:
    """What each LoRA adds, `[N, out]`, to its own rows `[N, in]`, without a graph; no result shares memory."""
    sizes = [len(each) for each in rows]
    with torch.no_grad():
        found = _product(torch.cat(list(rows)), sizes, loras)
    return [part.clone() for part in torch.split(found, sizes)]


def lora_gradients(
    loras: Sequence[LeasedLora], rows: Sequence[Tensor], upstream: Sequence[Tensor]
) -> list[LoraGradients]:
    """The gradients of each LoRA and of its rows `[N, in]`, of those of its contribution `upstream` `[N, out]`.

    `A x` is computed again, which costs little beside the linear itself.
    """
    sizes = [len(each) for each in rows]
    with torch.enable_grad():
        x = torch.cat([each.detach() for each in rows]).requires_grad_()
        leaves = [LeasedLora(_leaf(lora.down), _leaf(lora.up), lora.scale) for lora in loras]
        trained = [each for leaf in leaves for each in (leaf.down, leaf.up) if each.requires_grad]
        of_rows, *found = torch.autograd.grad(_product(x, sizes, leaves), [x, *trained], torch.cat(list(upstream)))
    of_matrix = {id(matrix): gradient for matrix, gradient in zip(trained, found, strict=True)}
    parts = torch.split(of_rows, sizes)
    return [
        LoraGradients(part.clone(), of_matrix.get(id(leaf.down)), of_matrix.get(id(leaf.up)))
        for part, leaf in zip(parts, leaves, strict=True)
    ]


def _leaf(matrix: Tensor) -> Tensor:
    return matrix.detach().requires_grad_(matrix.requires_grad)


def _product(x: Tensor, sizes: Sequence[int], loras: Sequence[LeasedLora]) -> Tensor:
    scales = [lora.scale for lora in loras]
    return grouped_low_rank(x, sizes, [lora.down for lora in loras], [lora.up for lora in loras], scales)
