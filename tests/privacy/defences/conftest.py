"""A tiny split model, a key, and passes of rows of chosen lengths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.models.tiny import tiny_checkpoint
from support.privacy.defended_model import DefendedModel

from isthmus.privacy.defences.defence import Pass
from isthmus.privacy.defences.secret_noise import SecretNoise

KEY = bytes(range(32))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("defended") / "model")


@pytest.fixture
def noise() -> SecretNoise:
    return SecretNoise(KEY)


@pytest.fixture
def passing(noise: SecretNoise) -> Callable[..., Pass]:
    """Makes passes: of these lengths, the so many-th of the run."""

    def make(*lengths: int, turn: int = 0, offset: int = 0) -> Pass:
        longest = max(lengths)
        ids = torch.arange(longest).expand(len(lengths), -1) + 10 * torch.arange(len(lengths)).unsqueeze(-1) + offset
        real = torch.arange(longest) < torch.tensor(lengths).unsqueeze(-1)
        return Pass(noise, ("test", turn), ids, real)

    return make


@pytest.fixture
def run(folder: Path, noise: SecretNoise) -> Callable[..., DefendedModel]:
    return lambda *defences, **more: DefendedModel(folder, noise, defences, **more)
