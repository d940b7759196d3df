"""A span of the tiny model, with sites and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.cloud.site_tenants import host_of
from support.models.tiny import N_LAYERS, tiny_checkpoint

from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.split.span import FrozenSpan, load_span


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FrozenSpan]:
    folder: Path = tiny_checkpoint("llama", tmp_path_factory.mktemp("llama") / "model")
    return lambda dtype, **options: load_span(folder, SplitPlan.parse("2:2", N_LAYERS), dtype=dtype, **options)


@pytest.fixture(scope="module")
def span(load: Callable[..., FrozenSpan]) -> FrozenSpan:
    return load(torch.float32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> SiteHost:
    return host_of(tmp_path_factory.mktemp("together"))
