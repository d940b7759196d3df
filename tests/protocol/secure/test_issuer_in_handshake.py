"""The handshake with a worker whom an issuer has certified: as good as by the root, and nothing else goes through."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.protocol.wire import NOW, ROOT, WORKER, forward, identity, new_cloud, new_edge, shake

from isthmus.common.errors import FingerprintError, FrameError, RemoteProtocolError, VersionError
from isthmus.protocol.secure.certificates import ISSUER_BYTES, IssuerCertificate, WorkerCertificate
from isthmus.protocol.secure.keys import WorkerIdentity
from isthmus.protocol.session import Received

ISSUER = Ed25519PrivateKey.from_private_bytes(bytes(range(3, 35)))
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(range(5, 37)))
HELLO, SIGNATURE = 1454, 64
"""Bytes of the server's hello of a worker that the root has certified, and of the signature at its end."""


def raw(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def certified(
    *, root: Ed25519PrivateKey = ROOT, by: Ed25519PrivateKey = ISSUER, until: int = NOW + 1000
) -> WorkerIdentity:
    issuer = IssuerCertificate.issue(root, raw(ISSUER), until)
    return WorkerIdentity(WORKER, WorkerCertificate.issue_by(by, issuer, raw(ROOT), raw(WORKER), NOW + 500))


def test_an_issuers_worker_is_let_in_and_its_hello_is_longer_by_the_certificate() -> None:
    edge, cloud = new_edge(), new_cloud(identity=certified())
    flights = shake(edge, cloud)
    assert edge.established
    assert cloud.established
    assert len(flights[1]) == HELLO + ISSUER_BYTES
    event = None
    for frame in edge.send(forward()):
        event = cloud.receive(frame)
    assert isinstance(event, Received)
    assert len(shake(new_edge(), new_cloud(identity=identity()))[1]) == HELLO


@pytest.mark.parametrize(
    ("worker", "said"),
    [
        (certified(by=STRANGER), "the worker's certificate is not signed"),
        (certified(root=STRANGER), "the issuer's certificate is not signed"),
        (certified(until=NOW), "issuer expired"),
        (dataclasses.replace(certified(), key=STRANGER), "does not prove"),
    ],
    ids=["another issuer", "an issuer of another root", "an expired issuer", "a stolen certificate"],
)
def test_an_edge_refuses(worker: WorkerIdentity, said: str) -> None:
    edge = new_edge()
    with pytest.raises(FingerprintError, match=said):
        shake(edge, new_cloud(identity=worker))
    assert edge.closed


def test_an_issuers_certificate_cannot_be_taken_out_on_the_way() -> None:
    def without(at: int, flight: bytes) -> bytes:
        return flight if at != 1 else flight[: HELLO - SIGNATURE] + flight[-SIGNATURE:]

    edge = new_edge()
    with pytest.raises(FingerprintError, match="not signed"):
        shake(edge, new_cloud(identity=certified()), without)
    assert edge.closed


def test_an_issuers_certificate_cannot_be_put_in_on_the_way() -> None:
    packed = IssuerCertificate.issue(ROOT, raw(ISSUER), NOW + 1000).to_bytes()

    def put_in(at: int, flight: bytes) -> bytes:
        return flight if at != 1 else flight[:-SIGNATURE] + packed + flight[-SIGNATURE:]

    with pytest.raises(FingerprintError, match="not signed"):
        shake(new_edge(), new_cloud(), put_in)


def test_an_issuer_that_the_same_root_has_certified_cannot_take_the_place_of_another_on_the_way() -> None:
    """All signatures of certificates are good then, and the worker's own is over another exchange."""
    longer = IssuerCertificate.issue(ROOT, raw(ISSUER), NOW + 2000).to_bytes()
    place = slice(HELLO - SIGNATURE, HELLO - SIGNATURE + ISSUER_BYTES)

    def exchanged(at: int, flight: bytes) -> bytes:
        return flight if at != 1 else flight[: place.start] + longer + flight[place.stop :]

    with pytest.raises(FingerprintError, match="does not prove"):
        shake(new_edge(), new_cloud(identity=certified()), exchanged)


@pytest.mark.parametrize("more", [-1, 1, -ISSUER_BYTES // 2])
def test_a_hello_of_any_other_length_is_refused(more: int) -> None:
    def cut(at: int, flight: bytes) -> bytes:
        return flight if at != 1 else flight[:more] if more < 0 else flight + bytes(more)

    with pytest.raises(FrameError, match=rf"{HELLO - 6} or {HELLO + ISSUER_BYTES - 6} are due"):
        shake(new_edge(), new_cloud(identity=certified()), cut)


def test_every_byte_of_the_issuers_certificate_is_covered() -> None:
    for place in range(HELLO - SIGNATURE, HELLO - SIGNATURE + ISSUER_BYTES):
        edge, cloud = new_edge(), new_cloud(identity=certified())

        def flipped(at: int, flight: bytes, place: int = place) -> bytes:
            return flight if at != 1 else flight[:place] + bytes((flight[place] ^ 0x80,)) + flight[place + 1 :]

        with contextlib.suppress(RemoteProtocolError, VersionError, FingerprintError):
            shake(edge, cloud, flipped)
        assert edge.closed
        assert not cloud.established
