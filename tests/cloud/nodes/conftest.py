"""An owner's folder and a node that is enrolled there; and a worker that has the model, with another one's key."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.cloud.clouds import Home, ThreadServer, served
from support.cluster.node_workers import FakeWorker
from support.cluster.owners_folder import OwnersFolder
from support.models.tiny import tiny_checkpoint

from isthmus.cloud.control import worker as control_worker
from isthmus.cloud.nodes import node_worker
from isthmus.cloud.nodes.node_worker import NodeWorker
from isthmus.cloud.nodes.peers import Peers
from isthmus.cloud.session.file_store import FileStore
from isthmus.cloud.session.served_model import Served
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import STAGE_OPTIONS
from isthmus.protocol.secure.keys import format_public_key


@pytest.fixture
def owner(tmp_path: Path) -> OwnersFolder:
    return OwnersFolder(tmp_path)


@pytest.fixture
def node(owner: OwnersFolder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an enrolled node, which this process takes for its own."""
    home = owner.new_node()
    monkeypatch.setenv("ISTHMUS_NODE_HOME", str(home))
    return home


@pytest.fixture
def on_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray, and without a pause."""
    monkeypatch.setattr(node_worker, "node_address", lambda: "10.0.0.5")
    monkeypatch.setattr(node_worker, "_import_heavy", lambda: None)
    monkeypatch.setattr(node_worker, "WAIT_SECONDS", 0.001)
    for module in (node_worker, control_worker):  # a process has one log, and these tests have several workers
        monkeypatch.setattr(module, "log_to", lambda path: None)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeWorker]:
    """No model is looked for, and nothing is served."""
    FakeWorker.made.clear()
    monkeypatch.setattr(node_worker, "Worker", FakeWorker)
    monkeypatch.setattr(NodeWorker, "_find_model", lambda self, home: Path("/models/found"))
    return FakeWorker


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("nodes") / "model")


@pytest.fixture(scope="module")
def cloud(model: Path) -> Served:
    plain = served(model, model.parent / "parts")
    return dataclasses.replace(plain, model=lambda: FileStore(model, m.FileSet.MODEL))


@pytest.fixture
def peers(home: Home) -> Peers:
    """Another worker of the home's cloud, enrolled there as the controller does it."""
    key = Ed25519PrivateKey.generate()
    line = f"{STAGE_OPTIONS} {format_public_key(key.public_key().public_bytes_raw(), 'worker-1')}"
    with (home.folder / "authorized_edges").open("a") as file:
        file.write(f"{line}\n")
    return Peers(home.pin, key)


@pytest.fixture
def address(peers: Peers, server: ThreadServer) -> str:
    """Where the worker is that has the model; it knows of the other one from the start."""
    return f"127.0.0.1:{server.port}"


Offering = Callable[[FileStore], str]


@pytest.fixture
def offering(peers: Peers, cloud: Served, home: Home) -> Iterator[Offering]:
    """Start a worker that offers the files of a store for its model; returns its address."""
    running: list[ThreadServer] = []

    def start(store: FileStore) -> str:
        running.append(ThreadServer(dataclasses.replace(cloud, model=lambda: store), home).start())
        return f"127.0.0.1:{running[-1].port}"

    yield start
    for each in running:
        each.__exit__()
