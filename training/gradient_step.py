"""How parameters move in a step: the interface that the loop needs, and the step of a torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from isthmus.common.errors import NonFiniteError


class StepRule(Protocol):
    """What moves the parameters as a step has measured, and what it remembers from step to step."""

    def apply(self, rate: float) -> None:
        """Move the parameters as measured, with the learning rate `rate`."""

    def state(self) -> dict[str, Tensor]:
        """What the next step needs besides parameters and random state."""

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`."""


class GradientStep:
    """The step of a torch optimizer, with gradients clipped by their norm; see `StepRule`.

    Args:
        optimizer: Moves the parameters. The learning rate of each of its groups is a multiple of the run's peak rate,
            and stays this multiple of the rate of each step.
        max_norm: Gradients are scaled down to this norm; `math.inf` leaves them as they are.
        remedy: What the user can do about gradients that are not finite.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        *,
        peak_rate: float,
        max_norm: float,
        remedy: str,
    ) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        self._multiples = [group["lr"] / peak_rate if peak_rate else 1.0 for group in optimizer.param_groups]
        self._max_norm = max_norm
        self._remedy = remedy

    def gradients(self, step: int, backward: Callable[[], float]) -> tuple[float, float]:
        """Compute and clip the gradients of step number `step` (from 1), and leave the parameters as they are.

        Args:
            backward: Adds the gradients of all micro-batches to the parameters, and returns the loss.

        Returns:
            The loss, and the norm that the gradients had before they were clipped.

        Raises:
            NonFiniteError: The norm is NaN or infinite.
        """
        self.clear()
        loss = backward()
        return loss, self.clip(step)

    def clear(self) -> None:
        """Forget the gradients of the step before."""
        self._optimizer.zero_grad(set_to_none=True)

    def clip(self, step: int) -> float:
        """Clip the gradients of step number `step`, and return the norm that they had before.

        Raises:
            NonFiniteError: The norm is NaN or infinite.
        """
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._max_norm, foreach=False)
        return require_finite(f"the gradients of step {step} have the norm", float(norm), self._remedy)

    def apply(self, rate: float) -> None:
        """See `StepRule`. The gradients are still there afterwards."""
        for group, multiple in zip(self._optimizer.param_groups, self._multiples, strict=True):
            group["lr"] = rate * multiple
        self._optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """The optimizer's moments and step counts, `<parameter>/<moment>`; LoRA-FA keeps them by pairs of A and B."""
        names: dict[Any, str] = {parameter: name for name, parameter in self._parameters.items()}
        return {
            f"{names.get(owner, owner)}/{moment}": value if isinstance(value, Tensor) else torch.tensor(value)
            for owner, values in self._optimizer.state.items()
            for moment, value in values.items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """See `StepRule`."""
        device = next(iter(self._parameters.values())).device
        for key, value in tensors.items():
            name, _, moment = key.rpartition("/")
            # AdamW keeps its step count on the CPU, whatever the parameter's device, and LoRA-FA as a plain number.
            count = value if value.is_floating_point() else int(value)
            owner: Any = self._parameters.get(name, name)
            self._optimizer.state[owner][moment] = count if moment == "step" else value.to(device)


def require_finite(what: str, value: float, remedy: str) -> float:
    """`value`, which stands behind `what` in a sentence.

    Raises:
        NonFiniteError: It is NaN or infinite; the message ends with `remedy`.
    """
    if not math.isfinite(value):
        raise NonFiniteError(f"{what} {value}: {remedy}")
    return value
