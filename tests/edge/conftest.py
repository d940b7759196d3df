"""A tiny model and its cloud for tests that generate, a download cache of each test's own, and one torch thread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cloud.clouds import served
from support.models.tiny import tiny_checkpoint

from isthmus.cloud.session.served_model import Served
from isthmus.common.torch_threads import torch_threads


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("generation") / "model")


@pytest.fixture(scope="module")
def tiny_cloud(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return served(tiny_model, tmp_path_factory.mktemp("parts") / "parts")


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As a `ThreadServer` has."""
    with torch_threads(1):
        yield
