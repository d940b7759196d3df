"""A cloud of a tiny model, whose meter says what really crosses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.cloud.clouds import Home, ThreadServer, served
from support.models.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadServer]:
    folder = tmp_path_factory.mktemp("cloud")
    model = tiny_checkpoint("llama", folder / "model")
    with pytest.MonkeyPatch.context() as patch, ThreadServer(served(model, folder / "parts"), Home(folder)) as running:
        patch.setenv("ISTHMUS_CACHE", str(folder / "cache"))
        yield running
