"""Tuning by forwards alone: MeZO (Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes").

A step draws a direction z, one standard normal number for each trained parameter, and measures the loss at θ + εz and
at θ - εz, both on the same micro-batches (SPSA, Spall 1992). The slope between them,

    g = (L(θ + εz) - L(θ - εz)) / 2ε,

is the gradient's projection on z, and the step is θ ← θ - η·(g·z + λθ) with the learning rate η and the weight decay λ.
Nothing goes backward, so the wire carries two forwards and no gradients, and the cloud keeps nothing for a step.

As in the paper:

- z is never stored: it is drawn again from the step's seed wherever it is needed. The seed follows from the run's seed
  and the step's number, so there is no state between steps and a resumed run goes on bit for bit.
- The model is in eval mode: with dropout, the two losses would differ in their masks as well as in the parameters.

Unlike there:

- θ is put back from a copy, not by subtracting what was added: adding and subtracting leaves a rounding error in each
  step, and adapters are small. Whatever breaks a forward, θ is exactly as it was.
- z is drawn on the CPU whatever the model's device, so that it is the same everywhere.
- The slope is cut off at `max_grad_norm` on either side: its mean square over z is the squared norm of the gradient.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from isthmus.edge.config.training_config import TuningConfig
from isthmus.edge.data.batches import Batch
from isthmus.edge.training.step_rule import REMEDY, BatchLoss
from isthmus.training.gradient_step import require_finite


class Mezo:
    """The rule of a forward-only run; see `EdgeRule`.

    Args:
        parameters: What is trained. The order decides which part of a direction each one gets.
    """

    goes_backward = False

    def __init__(self, parameters: Iterable[nn.Parameter], config: TuningConfig, loss: BatchLoss) -> None:
        self._parameters = tuple(parameters)
        self._config = config
        self._loss = loss
        self._step, self._slope = 0, 0.0

    @torch.no_grad()
    def measure(self, step: int, batches: Sequence[Batch]) -> tuple[float, float]:
        """See `EdgeRule`. The loss is the mean of the two, which is that of θ up to O(ε²); the norm is |g|."""
        eps = self._config.mezo_eps
        with self._restored() as start:
            above = self._loss_at(eps, start, step, batches)
            below = self._loss_at(-eps, start, step, batches)
        slope = require_finite(f"the gradients of step {step} have the slope", (above - below) / (2 * eps), REMEDY)
        limit = self._config.max_grad_norm or math.inf
        self._step, self._slope = step, max(-limit, min(limit, slope))
        return (above + below) / 2, abs(slope)

    @torch.no_grad()
    def apply(self, rate: float) -> None:
        """See `EdgeRule`."""
        for parameter, direction in self._directions(self._step):
            parameter.mul_(1 - rate * self._config.weight_decay).add_(direction, alpha=-rate * self._slope)

    def state(self) -> dict[str, Tensor]:
        """Nothing: a step follows from the parameters, the seed and its number."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Nothing to load."""

    def _loss_at(self, offset: float, start: Sequence[Tensor], step: int, batches: Sequence[Batch]) -> float:
        for (parameter, direction), value in zip(self._directions(step), start, strict=True):
            parameter.copy_(value).add_(direction, alpha=offset)
        return self._loss.over(step, batches)

    def _directions(self, step: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its part of the direction of a step."""
        seed = random.Random(f"mezo/{self._config.seed}/{step}").getrandbits(63)  # noqa: S311  # noise, not a secret
        generator = torch.Generator().manual_seed(seed)
        for parameter in self._parameters:
            yield parameter, torch.randn(parameter.shape, generator=generator).to(parameter)

    @contextmanager
    def _restored(self) -> Iterator[tuple[Tensor, ...]]:
        """Copies of the parameters, which have these values again afterwards, whatever happens."""
        start = tuple(parameter.clone() for parameter in self._parameters)
        try:
            yield start
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, start, strict=True):
                    parameter.copy_(value)
