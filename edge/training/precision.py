"""What an edge computes in: fp32, or bf16 by torch's autocast with trained weights in fp32.

autocast casts the weights of every linear anew in every forward. Those of a frozen one are the same each time, and on a
CPU the casts take as long as products in bf16 save. So in training they are cast once, which gives the same products.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from isthmus.edge.config.data_config import Precision
from isthmus.edge.config.training_config import TuningConfig


def computing_in(precision: Precision, model: Any) -> AbstractContextManager[Any]:
    """Where a forward runs: torch's autocast for bf16, which leaves the weights as they are, and nothing for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(model.device.type, torch.bfloat16)


def hold_frozen_linears(model: nn.Module, config: TuningConfig) -> None:
    """Hold the weights of frozen linears in what they compute in, in place; for a model that is to be trained.

    What is trained stays as it is, and so does all that is no linear: a token embedding that a frozen head shares keeps
    its weights, and the head gets its own. With method `full` nothing changes, as that saves the frozen weights, too.
    The outputs have the same bits as with autocast's casts, but with methods that look at the weights themselves: DoRA
    takes norms of them, which differ by rounding.

    Args:
        config: What it is trained with; its forwards are within `computing_in`.
    """
    if config.precision == "fp32" or config.method == "full":
        return
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            for name, weights in list(module.named_parameters(recurse=False)):
                if weights.dtype == torch.float32 and not weights.requires_grad:
                    setattr(module, name, nn.Parameter(weights.detach().to(torch.bfloat16), requires_grad=False))
