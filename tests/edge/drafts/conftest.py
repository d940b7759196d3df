"""Tiny models cut in two, with the span in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.models.local_cache import CachingLocalSpan
from support.models.tiny import tiny_checkpoint

from isthmus.common.torch_threads import torch_threads

from ...backbone.conftest import Checkpoints, Pair, Pairs, make_pairs


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    with torch_threads(1):
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tiny_checkpoint(family, tmp_path_factory.mktemp(family) / "model")
        return made[family]

    return get


@pytest.fixture
def pairs(checkpoints: Checkpoints) -> Pairs:
    """Pairs whose edge keeps caches."""
    make = make_pairs(checkpoints)

    def get(family: str, plan: str = "1:1", *, exact: bool = False) -> Pair:
        pair = make(family, plan)
        pair.edge.remote_layers.span = CachingLocalSpan(pair.span, exact=exact)
        return pair

    return get
