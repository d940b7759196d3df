"""Certificates of workers, by the root or by an issuer, and the requests of nodes: what verifies, and what must not."""

from __future__ import annotations

import dataclasses
import json
import stat
import struct
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.protocol.wire import NOW, PIN, ROOT, WORKER

from isthmus.common.errors import ConfigError, FingerprintError, IsthmusError, KeyFileError, NotEnrolledError
from isthmus.protocol.secure.certificates import (
    ISSUER_BYTES,
    REQUEST_SECONDS,
    CertificateRequest,
    IssuerCertificate,
    WorkerCertificate,
)
from isthmus.protocol.secure.keys import (
    DAY,
    Fingerprint,
    generate_edge,
    generate_root,
    issue_worker,
    load_edge,
    load_issuer,
    load_node,
    load_worker,
    make_issuer,
    make_worker_key,
)

ISSUER = Ed25519PrivateKey.from_private_bytes(bytes(range(3, 35)))
NODE = Ed25519PrivateKey.from_private_bytes(bytes(range(4, 36)))
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(range(5, 37)))
CLOUD = PIN.digest


def raw(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def of_issuer(root: Ed25519PrivateKey = ROOT, until: int = NOW + 1000) -> IssuerCertificate:
    return IssuerCertificate.issue(root, raw(ISSUER), until)


def of_worker(by: Ed25519PrivateKey = ISSUER, until: int = NOW + 100) -> WorkerCertificate:
    return WorkerCertificate.issue_by(by, of_issuer(), raw(ROOT), raw(WORKER), until)


# An issuer's certificate ----------------------------------------------------------------------------------------------


def test_an_issuers_certificate_is_good_under_its_root_until_it_expires() -> None:
    certificate = of_issuer()
    certificate.verify(raw(ROOT), NOW + 999)
    with pytest.raises(FingerprintError, match=r"issuer expired at 2023-.*isthmus cloud issuer"):
        certificate.verify(raw(ROOT), NOW + 1000)
    with pytest.raises(FingerprintError, match="the issuer's certificate is not signed by the root key"):
        certificate.verify(raw(STRANGER), NOW)


@pytest.mark.parametrize(
    "changes", [{"issuer": raw(STRANGER)}, {"not_after": NOW + 1001}, {"signature": bytes(64)}, {"issuer": bytes(32)}]
)
def test_nothing_in_an_issuers_certificate_may_change(changes: dict[str, object]) -> None:
    of_issuer().verify(raw(ROOT), NOW)
    with pytest.raises(FingerprintError, match="not signed"):
        dataclasses.replace(of_issuer(), **changes).verify(raw(ROOT), NOW)  # type: ignore[arg-type]


def test_an_issuers_certificate_survives_its_bytes_and_no_other_length_is_read() -> None:
    packed = of_issuer().to_bytes()
    assert len(packed) == ISSUER_BYTES
    assert IssuerCertificate.from_bytes(packed) == of_issuer()
    for length in (0, ISSUER_BYTES - 1, ISSUER_BYTES + 1):
        with pytest.raises(ConfigError, match=f"{ISSUER_BYTES} bytes, not {length}"):
            IssuerCertificate.from_bytes(packed.ljust(ISSUER_BYTES + 1, b"x")[:length])


def test_an_expiry_after_the_last_date_is_shown_all_the_same() -> None:
    of_issuer(until=(1 << 64) - 1).verify(raw(ROOT), NOW)
    with pytest.raises(FingerprintError, match="expired at 9999-12-31"):
        of_issuer(until=(1 << 64) - 1).verify(raw(ROOT), 2.0**65)


# A worker's certificate by an issuer ----------------------------------------------------------------------------------


def test_a_worker_is_good_by_way_of_an_issuer_until_it_expires() -> None:
    certificate = of_worker()
    certificate.verify(NOW + 99)
    with pytest.raises(FingerprintError, match="the worker's certificate expired"):
        certificate.verify(NOW + 100)


def test_a_workers_certificate_never_outlasts_its_issuers() -> None:
    assert of_worker(until=NOW + 10).not_after == NOW + 10
    late = of_worker(until=NOW + 5000)
    assert late.not_after == NOW + 1000
    late.verify(NOW + 999)


def test_an_expired_issuer_ends_its_workers() -> None:
    old = of_issuer(until=NOW + 5)
    until = NOW + 100  # by an issuer that does not keep to its own certificate
    signed = WorkerCertificate.issue_by(ISSUER, of_issuer(until=until), raw(ROOT), raw(WORKER), until)
    dishonest = dataclasses.replace(signed, issuer=old)
    dishonest.verify(NOW + 4)
    with pytest.raises(FingerprintError, match="issuer expired"):
        dishonest.verify(NOW + 5)


def test_a_certificate_of_another_issuer_is_refused() -> None:
    of_worker(ISSUER).verify(NOW)
    with pytest.raises(FingerprintError, match="the worker's certificate is not signed by the key that it names"):
        of_worker(STRANGER).verify(NOW)


def test_an_issuer_of_another_root_is_refused() -> None:
    of_stranger = dataclasses.replace(of_worker(), issuer=of_issuer(STRANGER))
    with pytest.raises(FingerprintError, match="the issuer's certificate is not signed by the root key"):
        of_stranger.verify(NOW)
    dataclasses.replace(of_stranger, root=raw(STRANGER)).verify(NOW)  # under its own root, which an edge compares


def test_an_issuers_certificate_can_be_neither_left_out_nor_put_in() -> None:
    with pytest.raises(FingerprintError, match="not signed"):
        dataclasses.replace(of_worker(), issuer=None).verify(NOW)
    by_root = WorkerCertificate.issue(ROOT, raw(WORKER), NOW + 100)
    by_root.verify(NOW)
    with pytest.raises(FingerprintError, match="not signed"):
        dataclasses.replace(by_root, issuer=of_issuer()).verify(NOW)


def test_a_certified_worker_is_no_issuer() -> None:
    """The root's signatures over a worker's key and over an issuer's carry different labels."""
    by_root = WorkerCertificate.issue(ROOT, raw(ISSUER), NOW + 1000)
    taken_for_issuer = IssuerCertificate(raw(ISSUER), NOW + 1000, by_root.signature)
    assert taken_for_issuer.to_bytes()[:40] == of_issuer().to_bytes()[:40]
    with pytest.raises(FingerprintError, match="not signed"):
        dataclasses.replace(of_worker(), issuer=taken_for_issuer).verify(NOW)
    taken_for_worker = WorkerCertificate(raw(ROOT), raw(ISSUER), NOW + 1000, of_issuer().signature)
    with pytest.raises(FingerprintError, match="not signed"):
        taken_for_worker.verify(NOW)


def test_json_keeps_the_issuer_and_older_files_have_none() -> None:
    for certificate in (of_worker(), WorkerCertificate.issue(ROOT, raw(WORKER), NOW + 100)):
        text = certificate.to_json()
        assert WorkerCertificate.from_json(text) == certificate
        assert ("issuer" in json.loads(text)) == (certificate.issuer is not None)


@pytest.mark.parametrize("issuer", ["AAAA", "!", 7, ["x"], ""])
def test_json_with_a_malformed_issuer_is_refused(issuer: object) -> None:
    text = json.dumps({**json.loads(of_worker().to_json()), "issuer": issuer})
    with pytest.raises(ConfigError, match="not a worker's certificate"):
        WorkerCertificate.from_json(text)


# Requests -------------------------------------------------------------------------------------------------------------


def asked(now: float = NOW) -> CertificateRequest:
    return CertificateRequest.make(NODE, CLOUD, raw(WORKER), now)


def test_a_request_is_good_for_its_cloud_while_it_is_new() -> None:
    request = asked(NOW + 0.9)
    assert (request.worker, request.node, request.asked_at) == (raw(WORKER), raw(NODE), NOW)
    for now in (NOW - REQUEST_SECONDS, NOW, NOW + REQUEST_SECONDS):
        request.verify(CLOUD, now)


@pytest.mark.parametrize("off", [-REQUEST_SECONDS - 1, REQUEST_SECONDS + 1])
def test_a_request_that_is_too_old_or_of_the_future_is_refused(off: int) -> None:
    with pytest.raises(IsthmusError, match=r"request is of 2023-.*: set the wrong clock") as found:
        asked().verify(CLOUD, NOW + off)
    assert not isinstance(found.value, NotEnrolledError)  # for which a worker is ended


def test_a_request_to_another_cloud_is_refused() -> None:
    other = Fingerprint.of(raw(STRANGER)).digest
    with pytest.raises(NotEnrolledError, match="of another cloud"):
        asked().verify(other, NOW)
    with pytest.raises(NotEnrolledError, match="has not signed that"):
        dataclasses.replace(asked(), cloud=other).verify(other, NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"worker": raw(STRANGER)},
        {"node": raw(STRANGER)},
        {"asked_at": NOW + 1},
        {"signature": bytes(64)},
        {"node": b""},
    ],
)
def test_nothing_in_a_request_may_change(changes: dict[str, object]) -> None:
    asked().verify(CLOUD, NOW)
    with pytest.raises(NotEnrolledError, match="has not signed that"):
        dataclasses.replace(asked(), **changes).verify(CLOUD, NOW)  # type: ignore[arg-type]


def test_a_nodes_signature_is_taken_for_nothing_else() -> None:
    """Its label keeps a request from being a certificate, though both sign a key and a time."""
    signature = NODE.sign(raw(WORKER) + struct.pack("!Q", NOW))
    with pytest.raises(NotEnrolledError, match="has not signed that"):
        dataclasses.replace(asked(), signature=signature).verify(CLOUD, NOW)
    certificate = WorkerCertificate(raw(NODE), raw(WORKER), NOW + 100, asked(NOW + 100).signature)
    with pytest.raises(FingerprintError, match="not signed"):
        certificate.verify(NOW)


# Files ----------------------------------------------------------------------------------------------------------------


def test_an_issuer_is_renewed_with_the_same_key(tmp_path: Path) -> None:
    pin = generate_root(tmp_path)
    first = make_issuer(tmp_path, 1, lambda: NOW)
    assert stat.S_IMODE((tmp_path / "issuer_key").stat().st_mode) == 0o600
    with pytest.raises(KeyFileError, match=r"issuer_cert.*expired.*isthmus cloud issuer"):
        load_issuer(tmp_path, lambda: NOW + DAY)
    second = make_issuer(tmp_path, 2, lambda: NOW)
    assert (second.issuer, second.not_after) == (first.issuer, first.not_after + DAY)
    loaded = load_issuer(tmp_path, lambda: NOW + DAY)
    assert (loaded.certificate, loaded.pin) == (second, pin)


def test_an_issuer_needs_no_root_key_and_makes_workers_that_load(tmp_path: Path) -> None:
    pin = generate_root(tmp_path)
    make_issuer(tmp_path)
    (tmp_path / "root_key").unlink()
    issuer = load_issuer(tmp_path)
    worker = tmp_path / "worker"
    worker.mkdir()
    key = make_worker_key(worker)
    (worker / "worker_cert").write_text(issuer.issue(raw(key), issuer.certificate.not_after + 5000.5).to_json())
    identity = load_worker(worker)
    assert identity.pin == pin
    assert identity.certificate.not_after == issuer.certificate.not_after
    (worker / "worker_cert").write_text(issuer.issue(raw(STRANGER), issuer.certificate.not_after).to_json())
    with pytest.raises(KeyFileError, match="for another key than worker_key"):
        load_worker(worker)


def test_an_issuer_without_a_root_key_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="root_key does not exist"):
        make_issuer(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_issuers_files_that_do_not_fit_or_are_damaged_are_refused(tmp_path: Path) -> None:
    generate_root(tmp_path)
    with pytest.raises(KeyFileError, match=r"issuer_key does not exist: run `isthmus cloud issuer`"):
        load_issuer(tmp_path)
    make_issuer(tmp_path)
    path = tmp_path / "issuer_cert"
    good = path.read_text()
    load_issuer(tmp_path)
    data = json.loads(good)
    other = generate_root(tmp_path / "other")
    make_issuer(tmp_path / "other")
    assert other != load_issuer(tmp_path).pin
    of_other = json.loads((tmp_path / "other" / "issuer_cert").read_text())
    for text, said in (
        ("", "not an issuer's certificate"),
        ("[]", "not an issuer's certificate"),
        ("[" * 100_000, "not an issuer's certificate"),
        (json.dumps({"root": data["root"]}), "not an issuer's certificate"),
        (json.dumps({**data, "issuer": "AAAA"}), f"{ISSUER_BYTES} bytes, not 3"),
        (json.dumps({**data, "root": of_other["root"]}), "not signed"),
        (json.dumps({**data, "root": "AAAA"}), "not signed"),
        (json.dumps(of_other), "for another key than issuer_key"),
    ):
        path.write_text(text)
        with pytest.raises(KeyFileError, match=said):
            load_issuer(tmp_path)
    path.write_text(good)
    path.chmod(0o666)
    with pytest.raises(KeyFileError, match="says whom to trust"):
        load_issuer(tmp_path)
    path.chmod(0o644)
    (tmp_path / "issuer_key").chmod(0o640)
    with pytest.raises(KeyFileError, match="can be read by others"):
        load_issuer(tmp_path)


def test_a_nodes_key_is_an_edges_with_a_remedy_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"node_key does not exist: run `isthmus cloud node-keygen`"):
        load_node(tmp_path)
    generate_edge(tmp_path / "node_key", "gpu-1")
    assert raw(load_node(tmp_path)) == raw(load_edge(tmp_path / "node_key"))
    (tmp_path / "node_key").write_text("nonsense")
    with pytest.raises(KeyFileError, match=r"not a private key.*node-keygen"):
        load_node(tmp_path)


def test_a_workers_key_is_made_once(tmp_path: Path) -> None:
    first = make_worker_key(tmp_path)
    assert raw(make_worker_key(tmp_path)) == raw(first)
    assert stat.S_IMODE((tmp_path / "worker_key").stat().st_mode) == 0o600
    generate_root(tmp_path)
    assert issue_worker(tmp_path).worker == raw(first)
