"""A tiny cloud that takes 64 tokens in a call, and a session with it; an owner, and the adapters that tenants send."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.cloud.clouds import served
from support.emulator.packages import Owner
from support.models.tiny import tiny_checkpoint
from support.protocol.wire import TENANT

from isthmus.cloud.engine.paused_calls import CallThreads
from isthmus.cloud.session.handler import TenantSession
from isthmus.cloud.session.served_model import Served
from isthmus.cloud.session.tenant_adapters import AdapterStore


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Served:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("session")
    return served(tiny_checkpoint("llama", folder / "model"), folder / "parts", max_tokens=64)


@pytest.fixture
def tenant(cloud: Served) -> TenantSession:
    cloud.executor.cache.evict_all()
    return cloud.session(b"s" * 16, TENANT, CallThreads(1, 16))


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Owner:
    torch.set_num_threads(1)
    return Owner(tmp_path_factory.mktemp("owner"))


@pytest.fixture
def store(owner: Owner, tmp_path: Path) -> AdapterStore:
    return owner.store(tmp_path / "adapters")
