"""The random state that a step depends on."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RandomState:
    """Python's and torch's global random states.

    `host` is the state of torch's CPU generator, uint8; `device` that of the CUDA generator, if there is one.
    """

    python: tuple[Any, ...]
    host: Tensor
    device: Tensor | None = None

    @classmethod
    def take(cls, device: torch.device) -> RandomState:
        """The states of now."""
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(random.getstate(), torch.get_rng_state(), on_device)

    def restore(self, device: torch.device) -> None:
        """Make them the states of now."""
        random.setstate(self.python)
        torch.set_rng_state(self.host)
        if self.device is not None and device.type == "cuda":
            torch.cuda.set_rng_state(self.device, device)
