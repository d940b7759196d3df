"""The folder of a cloud's owner, its controller and its commands, on a cluster of plain objects."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cluster.controlled_cloud import Clock, Cloud
from support.cluster.joined import Ray, Watched
from support.cluster.owners_folder import OwnersFolder
from support.models.tiny import tiny_checkpoint

from isthmus.cloud.control.serve_options import ClusterOptions, ServeOptions


@pytest.fixture
def owner(tmp_path: Path) -> OwnersFolder:
    return OwnersFolder(tmp_path)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cloud(owner: OwnersFolder, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    return Cloud(owner, clock, monkeypatch)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    return Ray(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("attached") / "model")


@pytest.fixture
def options(owner: OwnersFolder, model: Path) -> ServeOptions:
    owner.new_node()
    (owner.folder / "root_key").unlink()
    cluster = ClusterOptions("10.0.0.1:6379", detach=True)
    return ServeOptions(str(model), owner.folder, listen="node:7443", workers="2:4", cluster=cluster)


@pytest.fixture
def watched(ray: Ray, owner: OwnersFolder, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(ray, owner, monkeypatch)
