"""The rules by which a run's parameters move: AdamW, its two kinds for LoRA, and MeZO.

- `lora-plus`: LoRA+ (Hayou et al. 2024). AdamW whose learning rate for B is a multiple of that for A, as B starts at
  zero. Parameters are grouped as PEFT's `create_loraplus_optimizer` does it: vectors, such as DoRA's magnitudes, go
  with B; biases would not be decayed.
- `lora-fa`: LoRA-FA (Zhang et al. 2023). A stays as it was drawn, so its input need not be kept for a backward. PEFT's
  `LoraFAOptimizer` moves B alone, along g·(A·Aᵀ)⁻¹/s² (g is B's gradient, s LoRA's scale), with which the product of
  both comes as near as can be to a step of the whole matrix. PEFT computes this in bf16.
- `mezo`: forwards alone, see `isthmus.edge.training.mezo`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import peft.optimizers
import torch
from torch import nn

from isthmus.edge.config.training_config import TuningConfig
from isthmus.edge.data.batches import Batch
from isthmus.edge.training.defended_run import DefendedRun
from isthmus.edge.training.mezo import Mezo
from isthmus.edge.training.micro_batches import InFlight
from isthmus.edge.training.run_listener import TokenAccuracy
from isthmus.edge.training.step_rule import REMEDY, BatchLoss, EdgeRule, OnLogits
from isthmus.training.gradient_step import GradientStep


def step_rule(
    model: Any,
    parameters: Mapping[str, nn.Parameter],
    config: TuningConfig,
    check_stop: Callable[[], None],
    in_flight: InFlight | None = None,
    on_logits: OnLogits | None = None,
    accuracy: TokenAccuracy | None = None,
    defended: DefendedRun | None = None,
) -> EdgeRule:
    """The rule that `config.optimizer` names.

    Args:
        parameters: Its trainable parameters by name. `lora-fa` freezes some of them.
        on_logits, accuracy, defended: See `BatchLoss`.
    """
    loss = BatchLoss(model, config.precision, check_stop, in_flight, on_logits, accuracy, defended)
    if config.optimizer == "mezo":
        return Mezo(parameters.values(), config, loss)
    return Backprop(_optimizer(model, parameters, config), parameters, config, loss)


def _optimizer(model: Any, parameters: Mapping[str, nn.Parameter], config: TuningConfig) -> torch.optim.Optimizer:
    rate, decay = config.learning_rate, config.weight_decay
    optimizer: torch.optim.Optimizer
    if config.optimizer == "lora-plus":
        optimizer = peft.optimizers.create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=rate,
            loraplus_lr_ratio=config.lora_plus_ratio,
            loraplus_weight_decay=decay,
            foreach=False,
        )
    elif config.optimizer == "lora-fa":
        lora = model.active_peft_config
        optimizer = peft.optimizers.create_lorafa_optimizer(model, lora.r, lora.lora_alpha, rate, weight_decay=decay)
    else:
        optimizer = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=decay, foreach=False)
    return optimizer


class Backprop(GradientStep):
    """Forward and backward through each micro-batch, then a step of a torch optimizer; see `EdgeRule`.

    Args:
        optimizer: Moves the parameters. The learning rate of each of its groups is a multiple of the run's.
    """

    goes_backward = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        config: TuningConfig,
        loss: BatchLoss,
    ) -> None:
        limit = config.max_grad_norm or math.inf
        super().__init__(optimizer, parameters, peak_rate=config.learning_rate, max_norm=limit, remedy=REMEDY)
        self._moved = [parameter for parameter in parameters.values() if parameter.requires_grad]
        self._loss = loss

    def measure(self, step: int, batches: Sequence[Batch]) -> tuple[float, float]:
        """See `EdgeRule`. Gradients are scaled down to `max_grad_norm`; the norm is the one that they had."""
        return self.gradients(step, lambda: self._loss.over(step, batches, self._moved))
