"""The model's files beside the controller: workers of enrolled nodes fetch them over real sessions; nobody else does.

A gateway of these tests ends with the process.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.cluster.owners_folder import OwnersFolder
from support.models.tiny import tiny_checkpoint
from support.protocol.wire import PIN

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.cloud.cluster import model_files
from isthmus.cloud.cluster.cluster_spec import ClusterSpec
from isthmus.cloud.cluster.issuing import HOUR, IssuingOffice
from isthmus.cloud.cluster.model_files import ModelFiles
from isthmus.cloud.control.worker import WorkerSpec
from isthmus.cloud.nodes.node_worker import NodeSpec
from isthmus.cloud.nodes.peers import Peers
from isthmus.common.errors import ConnectionLostError, FingerprintError, NotEnrolledError, RemoteProtocolError
from isthmus.protocol import messages as m
from isthmus.protocol.secure.keys import make_issuer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("owner") / "model")


@pytest.fixture
def spec(owner: OwnersFolder, model: Path) -> ClusterSpec:
    worker = WorkerSpec(str(model), "tiny", "2:2", "fp32", "", "", "node:7443", 1, 1, 1, "")
    digest = Checkpoint(model, "tiny").digest()
    node = NodeSpec("cloud", owner.pin.digest, worker, digest, str(model), "parts")
    return ClusterSpec("cloud", str(owner.folder), node, 1, 1)


@pytest.fixture
def peers(owner: OwnersFolder) -> Peers:
    return Peers(owner.pin, Ed25519PrivateKey.generate())


@pytest.fixture(autouse=True)
def on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "node_address", lambda: "127.0.0.1")


@pytest.fixture
def known(peers: Peers) -> list[bytes]:
    """The keys of workers that may fetch."""
    return [Ed25519PrivateKey.generate().public_key().public_bytes_raw(), peers.key.public_key().public_bytes_raw()]


@pytest.fixture
def address(spec: ClusterSpec, owner: OwnersFolder, known: list[bytes]) -> str:
    files = ModelFiles(spec, IssuingOffice(owner.folder, spec.hours), lambda: known)
    return files.start()


def fetch(peers: Peers, address: str, folder: Path, file_set: m.FileSet = m.FileSet.MODEL) -> list[str]:
    folder.mkdir(exist_ok=True)
    return asyncio.run(peers.fetch(address, file_set, folder))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_worker_that_is_known_fetches_the_model(peers: Peers, address: str, model: Path, tmp_path: Path) -> None:
    fetch(peers, address, tmp_path / "fetched")
    assert files(tmp_path / "fetched") == files(model)


def test_a_worker_that_is_not_known_or_not_any_more_is_refused(
    peers: Peers, address: str, known: list[bytes], tmp_path: Path
) -> None:
    stranger = dataclasses.replace(peers, key=Ed25519PrivateKey.generate())
    with pytest.raises(NotEnrolledError):
        fetch(stranger, address, tmp_path / "fetched")
    fetch(peers, address, tmp_path / "first")
    known.pop()
    with pytest.raises(NotEnrolledError):
        fetch(peers, address, tmp_path / "second")
    assert files(tmp_path / "fetched") == files(tmp_path / "second") == {}


def test_it_shows_the_clouds_root_and_no_other(peers: Peers, address: str, tmp_path: Path) -> None:
    with pytest.raises(FingerprintError, match="not the pinned"):
        fetch(dataclasses.replace(peers, pin=PIN), address, tmp_path / "fetched")


@pytest.mark.parametrize("file_set", [m.FileSet.ADAPTERS, m.FileSet.PARTS, m.FileSet.ADAPTER])
def test_nothing_but_the_model_is_to_be_had(peers: Peers, address: str, tmp_path: Path, file_set: m.FileSet) -> None:
    with pytest.raises(RemoteProtocolError, match="there are no such files here"):
        fetch(peers, address, tmp_path / "fetched", file_set)
    assert fetch(peers, address, tmp_path / "fetched", m.FileSet.MODEL)


def test_a_saved_span_is_handed_out_by_nobody(spec: ClusterSpec, owner: OwnersFolder) -> None:
    saved = dataclasses.replace(spec.worker.worker, saved_span="/shared/span")
    closed = dataclasses.replace(spec, worker=dataclasses.replace(spec.worker, worker=saved))
    assert ModelFiles(closed, IssuingOffice(owner.folder, 24.0), list).start() == ""


def test_its_certificate_is_renewed_when_half_of_its_time_has_passed(
    spec: ClusterSpec, owner: OwnersFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    gateway = ModelFiles(dataclasses.replace(spec, hours=2.0), IssuingOffice(owner.folder, 2.0), list)
    monkeypatch.setattr(model_files, "time", SimpleNamespace(time=lambda: now))
    first = gateway.identity()
    first.certificate.verify(now)
    assert first.certificate.not_after == int(now + 2 * HOUR)
    now += HOUR - 60
    assert gateway.identity() is first
    now += 120
    second = gateway.identity()
    assert second.certificate.not_after > first.certificate.not_after
    assert second.certificate.worker == first.certificate.worker
    assert second.pin == owner.pin


def test_an_issuer_that_is_renewed_later_is_used_then_and_a_stranger_does_not_learn_why(
    spec: ClusterSpec, owner: OwnersFolder, peers: Peers, known: list[bytes], model: Path, tmp_path: Path,
    log: Callable[[], list[dict[str, object]]],
) -> None:  # fmt: skip
    make_issuer(owner.folder, 1, lambda: time.time() - 2 * 86_400)
    address = ModelFiles(spec, IssuingOffice(owner.folder, 24.0), lambda: known).start()
    with pytest.raises(ConnectionLostError, match=r"no answer|no certificate|closed the stream") as refused:
        fetch(peers, address, tmp_path / "fetched")
    assert str(owner.folder) not in str(refused.value)
    assert [str(owner.folder) in str(line["error"]) for line in log() if line["event"] == "no_certificate"] == [True]
    make_issuer(owner.folder, 1)
    fetch(peers, address, tmp_path / "fetched")
    assert files(tmp_path / "fetched") == files(model)
