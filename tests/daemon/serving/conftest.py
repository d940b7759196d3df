"""A real server with a tiny model that writes letters, and a daemon's answers from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cloud.clouds import Home as CloudHome, ThreadServer, served
from support.models.writing_model import writing_checkpoint

from isthmus.common.torch_threads import torch_threads
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.home import Home
from isthmus.edge.config.client_config import ClientConfig


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadServer]:
    folder = tmp_path_factory.mktemp("writing")
    home = CloudHome(folder)
    with ThreadServer(served(writing_checkpoint("llama", folder / "model"), folder / "parts"), home) as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, torch_threads(1):  # as the server's
        patch.setenv("ISTHMUS_CACHE", str(tmp_path_factory.mktemp("parts")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def settings(server: ThreadServer) -> DaemonSettings:
    config = ClientConfig(cloud=server.address, key=server.home.key_file, connect_timeout=5)
    return DaemonSettings(clouds={"main": config})


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.make(tmp_path / "daemon")
