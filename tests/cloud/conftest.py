"""A tiny cloud for the tests of its server, and its log."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cloud.clouds import Home, ThreadServer, served
from support.models.tiny import tiny_checkpoint

from isthmus.cloud.session.served_model import Served
from isthmus.cloud.telemetry import logs


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("server")
    return served(tiny_checkpoint("llama", folder / "model"), folder / "parts")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture
def server(cloud: Served, home: Home) -> Iterator[ThreadServer]:
    with ThreadServer(cloud, home) as running:
        yield running


@pytest.fixture
def to_drain(cloud: Served, home: Home) -> Iterator[ThreadServer]:
    """A server that the test itself drains."""
    running = ThreadServer(cloud, home).start()
    yield running
    running.stop_loop()


@pytest.fixture
def log() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The structured log, parsed."""
    stream = io.StringIO()
    handler = logs.logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter())
    before = logs.LOGGER.handlers[:], logs.LOGGER.level, logs.LOGGER.propagate
    logs.LOGGER.handlers[:] = [handler]
    logs.LOGGER.setLevel("INFO")
    logs.LOGGER.propagate = False
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logs.LOGGER.handlers[:], logs.LOGGER.propagate = before[0], before[2]
    logs.LOGGER.setLevel(before[1])
