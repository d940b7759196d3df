"""Tiny checkpoints, made once in a run, public text for them, and emulators of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models.tiny import HIDDEN, N_LAYERS, VOCAB, tiny_checkpoint
from torch import Tensor

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.emulator.compress.emulator_model import Emulator, build_emulator
from isthmus.emulator.compress.recipe import Recipe

Checkpoints = Callable[..., Checkpoint]
PLAN = SplitPlan.parse("1:1", N_LAYERS)  # the middle is 1, 2, 3, 4


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    made: dict[tuple[Any, ...], Path] = {}

    def get(family: str, **overrides: Any) -> Checkpoint:
        key = (family, *sorted(overrides.items()))
        if key not in made:
            made[key] = tiny_checkpoint(family, tmp_path_factory.mktemp(family) / "model", **overrides)
        return Checkpoint(made[key], family)

    return get


@pytest.fixture(scope="session")
def blocks() -> Tensor:
    """48 blocks of 16 tokens with something to learn: each token follows from the one before."""
    generator = torch.Generator().manual_seed(5)
    first = torch.randint(3, VOCAB, (48, 1), generator=generator)
    step = torch.randint(1, 4, (48, 1), generator=generator)
    return (first + step * torch.arange(16) - 3) % (VOCAB - 3) + 3


def make(checkpoint: Checkpoint, text: str, keep: float, blocks: Tensor | None = None, **options: Any) -> Emulator:
    return build_emulator(checkpoint, PLAN, Recipe.parse(text, keep), blocks, **options)


def hidden_states(seed: int = 0, length: int = 20) -> Tensor:
    return torch.randn(2, length, HIDDEN, generator=torch.Generator().manual_seed(seed))
