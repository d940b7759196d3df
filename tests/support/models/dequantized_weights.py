"""Watching what becomes of dequantized weights."""

from __future__ import annotations

import dataclasses
import weakref

import torch
from torch import Tensor

from isthmus.backbone.checkpoints.weight_quantization import Quantizer, Tensors


def noting(quantizer: Quantizer) -> tuple[Quantizer, list[weakref.ref[Tensor]]]:
    """A quantizer that notes every weight that it dequantizes, and its notes; they keep no weight alive."""
    weights: list[weakref.ref[Tensor]] = []

    def dense(tensors: Tensors, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        weight = quantizer.dense(tensors, shape, dtype)
        weights.append(weakref.ref(weight))
        return weight

    return dataclasses.replace(quantizer, dense=dense), weights
