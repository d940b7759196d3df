"""The tiny model that is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.models.tiny import tiny_checkpoint


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=2)
