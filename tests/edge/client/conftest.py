"""A tiny cloud in memory for the links, a cache of each test's own, and a clock that moves only by sleeping."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.cloud.clouds import served
from support.cloud.memory_cloud import MemoryCloud, StillTime
from support.models.tiny import tiny_checkpoint

from isthmus.cloud.session.served_model import Served
from isthmus.edge.client import session_keeper


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole model."""
    torch.set_num_threads(1)
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("links") / "model")


@pytest.fixture(scope="module")
def shared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Its span, for all clouds of a module."""
    return served(folder, tmp_path_factory.mktemp("cloud") / "parts", max_tokens=256)


@pytest.fixture
def cloud(shared: Served) -> MemoryCloud:
    shared.executor.cache.evict_all()
    return MemoryCloud(shared)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that moves only by sleeping; returns the pauses that the link made."""
    still = StillTime()
    monkeypatch.setattr(session_keeper, "time", still)
    return still.pauses
