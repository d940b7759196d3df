"""A real server with a tiny model that writes letters, and what generates over a link to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from support.cloud.clouds import Home, ThreadServer, served
from support.models.writing_model import writing_checkpoint

from isthmus.common.torch_threads import torch_threads
from isthmus.edge.client.link import Link
from isthmus.edge.config.client_config import GenerateConfig
from isthmus.edge.generation.text_generator import TextGenerator, text_generator

Opener = Callable[..., AbstractContextManager[TextGenerator]]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadServer]:
    folder = tmp_path_factory.mktemp("writing")
    with ThreadServer(served(writing_checkpoint("llama", folder / "model"), folder / "parts"), Home(folder)) as running:
        yield running


@pytest.fixture(scope="session")
def parts_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps the edge's parts."""
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(autouse=True)
def _alone(parts_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ISTHMUS_CACHE", str(parts_cache))
    with torch_threads(1):  # as the server's
        yield


@pytest.fixture
def link(server: ThreadServer) -> Iterator[Link]:
    with server.link() as opened:
        opened.open(5)
        yield opened


@pytest.fixture
def opener(link: Link) -> Opener:
    """Opens what generates, with settings."""

    def opened(adapter: Path | None = None, **settings: Any) -> AbstractContextManager[TextGenerator]:
        config = GenerateConfig(**{"cloud": "-", "max_new_tokens": 12, **settings})
        return text_generator(link, config, adapter)

    return opened


@pytest.fixture
def generator(opener: Opener) -> Iterator[TextGenerator]:
    with opener() as found:
        yield found


@pytest.fixture
def sent(link: Link) -> list[int]:
    """How many token positions each message to the cloud's caches had."""
    positions: list[int] = []
    ask = link._keeper._ask

    def counting(stream: Any, message: Any, *rest: Any) -> Any:
        if type(message).__name__ == "Decode":
            positions.append(message.hidden.shape[1])
        return ask(stream, message, *rest)

    link._keeper._ask = counting  # type: ignore[method-assign]
    return positions
