"""Tiny clouds for links, in memory, for whole runs, and for tests that generate; and what a test has to itself.

That is a download cache, a clock that moves only by sleeping, and one torch thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.cloud.clouds import served
from support.cloud.memory_cloud import MemoryCloud, StillTime
from support.cloud.train_runs import Runs, cloud_for_runs
from support.models.tiny import tiny_checkpoint

from isthmus.cloud.session.served_model import Served
from isthmus.common.torch_threads import torch_threads
from isthmus.edge.client import session_keeper


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole model that `shared` serves."""
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """A cloud that whole runs of a module train against."""
    with cloud_for_runs(tmp_path_factory.mktemp("runs")) as started:
        yield started


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that moves only by sleeping; returns the pauses that the link made."""
    still = StillTime()
    monkeypatch.setattr(session_keeper, "time", still)
    return still.pauses


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
