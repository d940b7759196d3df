"""What Tinker's SDK leaves behind in the process of the tests, and the queues without pauses."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.daemon.queue_parts import Parts
from tinker.lib.internal_client_holder import sessionless_holder_cache

from isthmus.daemon.tinker import tinker_patience


@pytest.fixture(autouse=True, scope="module")
def connections_of_the_sdk() -> Iterator[None]:
    """Close the SDK's connections: it leaves some open, of which Python warns when they are collected."""
    yield
    for holder in sessionless_holder_cache._holders.values():
        holder.run_coroutine_threadsafe(holder.aclose()).result()
    sessionless_holder_cache._holders.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    monkeypatch.setattr(tinker_patience, "FIRST_PAUSE", 0.0)
    return Parts(tmp_path)
