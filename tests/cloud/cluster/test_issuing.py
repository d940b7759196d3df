"""Certificates for workers of enrolled nodes alone, and the list of tenants as the controller reads it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.cluster.owners_folder import OwnersFolder
from support.protocol.wire import NOW, PIN

from isthmus.cloud.cluster.issuing import HOUR, NODES_FILE, SETTLED_SECONDS, IssuingOffice, TenantsText, enrolled_nodes
from isthmus.common.errors import ConfigError, IsthmusError, KeyFileError, NotEnrolledError
from isthmus.protocol.enrolment import add_line
from isthmus.protocol.secure.certificates import REQUEST_SECONDS, CertificateRequest
from isthmus.protocol.secure.keys import DAY, generate_edge, load_edge, load_node, make_issuer

WORKER = Ed25519PrivateKey.generate().public_key().public_bytes_raw()


@pytest.fixture
def owner(tmp_path: Path) -> OwnersFolder:
    return OwnersFolder(tmp_path, now=NOW)


def office(owner: OwnersFolder, *, hours: float = 24, now: float = NOW) -> IssuingOffice:
    return IssuingOffice(owner.folder, hours, lambda: now)


def asked(owner: OwnersFolder, node: Ed25519PrivateKey, now: float = NOW) -> CertificateRequest:
    return CertificateRequest.make(node, owner.pin.digest, WORKER, now)


def test_a_worker_of_an_enrolled_node_gets_a_certificate_for_some_hours(owner: OwnersFolder) -> None:
    certificate = office(owner, hours=2).grant(asked(owner, owner.node_key()))
    certificate.verify(NOW)
    assert (certificate.worker, certificate.not_after) == (WORKER, NOW + 2 * HOUR)
    assert certificate.issuer is not None
    issuer = office(owner).issuer()
    assert (certificate.issuer, certificate.root) == (issuer.certificate, issuer.root)
    long = office(owner, hours=24 * 30).grant(asked(owner, owner.node_key("gpu-2")))
    assert long.not_after == issuer.certificate.not_after


def test_a_node_that_is_not_enrolled_gets_none_until_it_is(owner: OwnersFolder) -> None:
    home = owner.new_node(enrolled=False)
    request = asked(owner, load_node(home))
    with pytest.raises(NotEnrolledError, match=r"the node's key SHA256:\S+ is not enrolled: run `isthmus cloud enroll"):
        office(owner).grant(request)
    add_line(owner.folder / NODES_FILE, (home / "node_key.pub").read_text())
    assert office(owner).grant(request).worker == WORKER
    (owner.folder / NODES_FILE).write_text("# none any more\n")
    with pytest.raises(NotEnrolledError, match="is not enrolled"):
        office(owner).grant(request)


def test_a_node_is_taken_off_once_the_shorter_list_has_been_read_twice(owner: OwnersFolder) -> None:
    clock = [NOW]
    running, path = IssuingOffice(owner.folder, 24, lambda: clock[0]), owner.folder / NODES_FILE

    def enrolled() -> int:
        found = running.nodes()
        assert found is not None
        return len(found)

    owner.new_node()
    owner.new_node("gpu-2")
    both = path.read_text()
    assert enrolled() == 2
    path.write_text("")
    assert enrolled() == 2
    clock[0] += SETTLED_SECONDS / 2
    assert enrolled() == 2
    path.write_text(both.splitlines(keepends=True)[0])  # the next look finds another one
    clock[0] += SETTLED_SECONDS
    assert enrolled() == 2
    clock[0] += SETTLED_SECONDS
    assert enrolled() == 1
    path.write_text(both)
    assert enrolled() == 2  # more are known at once
    path.unlink()
    assert enrolled() == 2
    clock[0] += SETTLED_SECONDS
    assert enrolled() == 0


def test_an_enrolled_edge_is_no_node(owner: OwnersFolder, tmp_path: Path) -> None:
    add_line(owner.folder / "authorized_edges", generate_edge(tmp_path / "id", "alice"))
    with pytest.raises(NotEnrolledError, match="is not enrolled"):
        office(owner).grant(asked(owner, load_edge(tmp_path / "id")))


def test_a_request_that_its_node_has_not_signed_lately_for_this_cloud_gets_none(owner: OwnersFolder) -> None:
    node = owner.node_key()
    good = asked(owner, node)
    assert office(owner, now=NOW + REQUEST_SECONDS).grant(good).worker == WORKER
    other_node = owner.node_key("gpu-2").public_key().public_bytes_raw()
    for request, now in (
        (good, NOW + REQUEST_SECONDS + 1),
        (good, NOW - REQUEST_SECONDS - 1),
        (CertificateRequest.make(node, PIN.digest, WORKER, NOW), NOW),
        (dataclasses.replace(good, worker=bytes(32)), NOW),
        (dataclasses.replace(good, node=other_node), NOW),
    ):
        error = NotEnrolledError if now == NOW else IsthmusError
        with pytest.raises(error):
            office(owner, now=now).grant(request)
        with pytest.raises(error):
            office(owner, now=now).check(request, owner.pin.digest)


def test_a_proof_of_its_node_needs_no_issuer(owner: OwnersFolder) -> None:
    request = asked(owner, owner.node_key())
    (owner.folder / "issuer_key").unlink()
    office(owner).check(request, owner.pin.digest)
    with pytest.raises(KeyFileError, match="issuer_key does not exist"):
        office(owner).grant(request)


def test_an_expired_issuer_grants_nothing_and_a_renewed_one_is_read_at_once(owner: OwnersFolder) -> None:
    node, late = owner.node_key(), NOW + 8 * DAY
    running = office(owner, now=late)
    with pytest.raises(KeyFileError, match="issuer expired"):
        running.grant(asked(owner, node, late))
    make_issuer(owner.folder, 7, lambda: late)
    assert running.grant(asked(owner, node, late)).not_after == late + DAY


def test_there_are_no_nodes_where_there_is_no_file_and_a_malformed_one_is_no_empty_one(owner: OwnersFolder) -> None:
    assert len(enrolled_nodes(owner.folder)) == 0
    owner.new_node()
    assert len(enrolled_nodes(owner.folder)) == 1
    path = owner.folder / NODES_FILE
    path.chmod(0o666)
    with pytest.raises(KeyFileError, match="says whom to trust"):
        enrolled_nodes(owner.folder)
    path.chmod(0o644)
    path.write_text(path.read_text() + "nonsense\n")
    with pytest.raises(ConfigError, match=f"{NODES_FILE}, line 2"):
        enrolled_nodes(owner.folder)


def test_the_last_good_tenants_stay_while_their_file_is_malformed(owner: OwnersFolder, tmp_path: Path) -> None:
    path, tenants = owner.folder / "authorized_edges", TenantsText(owner.folder)
    assert (tenants(), tenants.fault) == ("", "")
    add_line(path, generate_edge(tmp_path / "id", "alice"))
    good = path.read_text()
    assert (tenants(), tenants.fault) == (good, "")
    for spoilt in (good + "nonsense\n", good + good):
        path.write_text(spoilt)
        assert tenants() == good
        assert "authorized_edges, line 2" in tenants.fault
    path.write_bytes(b"\xff\xfe")
    assert tenants() == good
    assert "authorized_edges is not text in UTF-8" in tenants.fault
    path.write_text(f"{good}# and nobody else\n")
    assert (tenants(), tenants.fault) == (f"{good}# and nobody else\n", "")
    path.chmod(0o666)
    path.write_text(good)
    assert tenants() != good
    assert "says whom to trust" in tenants.fault
    path.unlink()
    assert (tenants(), tenants.fault) == ("", "")
