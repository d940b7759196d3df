"""Which certificate a worker is delivered, by the key that it has reported last."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cluster.owners_folder import OwnersFolder

from isthmus.cloud.cluster.issuing import IssuingOffice
from isthmus.cloud.cluster.known_workers import KnownWorkers
from isthmus.cloud.directory import Report
from isthmus.cloud.nodes.deliveries import Delivery, NodeReport
from isthmus.cloud.nodes.worker_home import WorkerHome
from isthmus.common.errors import KeyFileError
from isthmus.protocol.secure.certificates import WorkerCertificate


@pytest.fixture
def known(owner: OwnersFolder) -> KnownWorkers:
    return KnownWorkers(IssuingOffice(owner.folder, 24), owner.pin.digest)


@pytest.fixture
def nodes(owner: OwnersFolder) -> tuple[Path, Path]:
    """The folders of two enrolled nodes."""
    return owner.new_node("gpu-1"), owner.new_node("gpu-2")


def started(owner: OwnersFolder, node: Path, monkeypatch: pytest.MonkeyPatch) -> WorkerHome:
    """Worker 0, as it is started on a node."""
    monkeypatch.setenv("ISTHMUS_NODE_HOME", str(node))
    return WorkerHome(("cloud", owner.pin.digest), 0)


def report(home: WorkerHome) -> NodeReport:
    return NodeReport(Report({}, None), home.public_key, "node", "place", home.request(), home.wants_certificate)


def turn(known: KnownWorkers, home: WorkerHome) -> str:
    """Take a worker's report, and deliver what there is for it. Returns the certificate that was delivered."""
    known.take(0, report(home))
    delivered = known.certificate(0)
    home.write(Delivery(delivered))
    return delivered


def test_a_worker_that_comes_back_to_a_node_goes_on_with_the_certificate_that_it_has_there(
    owner: OwnersFolder, known: KnownWorkers, nodes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for node in nodes:
        home = started(owner, node, monkeypatch)
        assert WorkerCertificate.from_json(turn(known, home)).worker == home.public_key
        assert home.is_certified
    back = started(owner, nodes[0], monkeypatch)
    assert (back.is_certified, back.wants_certificate) == (True, False)
    (owner.folder / "issuer_cert").unlink()  # it could not be certified anew
    assert turn(known, back) == ""
    assert back.is_certified


def test_a_key_whose_request_is_not_granted_is_not_delivered_the_certificate_of_the_one_before(
    owner: OwnersFolder, known: KnownWorkers, nodes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = started(owner, nodes[0], monkeypatch)
    turn(known, first)
    assert known.certificate(0)
    (owner.folder / "issuer_cert").unlink()
    moved = started(owner, nodes[1], monkeypatch)
    with pytest.raises(KeyFileError):
        known.take(0, report(moved))
    assert known.certificate(0) == ""


def test_a_worker_that_is_forgotten_has_no_certificate_to_deliver(
    owner: OwnersFolder, known: KnownWorkers, nodes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = started(owner, nodes[0], monkeypatch)
    turn(known, home)
    known.forget(0)
    assert known.certificate(0) == ""
    assert turn(known, home) == ""  # it wants none
    assert home.is_certified
