"""Certificates for Ray's TLS, in handshakes of Python's own TLS: each side knows the other by CA and name."""

from __future__ import annotations

import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from isthmus.cloud.cluster.ray_tls import CA_CERT, CA_KEY, NODE_FILES, issue_node, make_ca
from isthmus.common.errors import KeyFileError


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    make_ca(tmp_path / "ca", 30)
    return tmp_path / "ca"


def context(side: int, node: dict[str, str]) -> ssl.SSLContext:
    """As Ray has it on both sides: a certificate of its own, and the other's checked by the CA."""
    made = ssl.SSLContext(side)
    made.load_cert_chain(node["RAY_TLS_SERVER_CERT"], node["RAY_TLS_SERVER_KEY"])
    made.load_verify_locations(node["RAY_TLS_CA_CERT"])
    made.verify_mode = ssl.CERT_REQUIRED
    return made


def shake(server: dict[str, str], client: dict[str, str], name: str) -> None:
    """A handshake in memory. Raises ssl.SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        context(ssl.PROTOCOL_TLS_CLIENT, client).wrap_bio(to_client, to_server, server_hostname=name),
        context(ssl.PROTOCOL_TLS_SERVER, server).wrap_bio(to_server, to_client, server_side=True),
    ]
    while sides:
        for side in tuple(sides):
            try:
                side.do_handshake()
                sides.remove(side)
            except ssl.SSLWantReadError:
                continue


def test_nodes_of_one_ca_know_each_other_by_their_names(ca: Path, tmp_path: Path) -> None:
    one = issue_node(ca, ["10.0.0.1", "gpu-1.example"], tmp_path / "one", 20)
    two = issue_node(ca, ["10.0.0.2"], tmp_path / "two", 20)
    for name in ("10.0.0.1", "gpu-1.example", "127.0.0.1", "localhost"):
        shake(one, two, name)
    for name in ("10.0.0.2", "gpu-2.example"):
        with pytest.raises(ssl.SSLCertVerificationError, match=r"mismatch|not valid for"):
            shake(one, two, name)
    shake(two, one, "10.0.0.2")


def test_a_node_of_another_ca_is_not_known(ca: Path, tmp_path: Path) -> None:
    make_ca(tmp_path / "other-ca", 30)
    ours = issue_node(ca, ["10.0.0.1"], tmp_path / "ours", 20)
    strangers = issue_node(tmp_path / "other-ca", ["10.0.0.1"], tmp_path / "strangers", 20)
    shake(ours, ours, "10.0.0.1")
    for server, client in ((strangers, ours), (ours, strangers)):
        with pytest.raises(ssl.SSLError):
            shake(server, client, "10.0.0.1")


def test_a_node_is_no_ca(ca: Path, tmp_path: Path) -> None:
    issue_node(ca, ["10.0.0.1"], tmp_path / "one", 20)
    made, own = (
        x509.load_pem_x509_certificate(path.read_bytes())
        for path in (tmp_path / "one" / "ray_tls_cert.pem", ca / CA_CERT)
    )
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert own.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert own.not_valid_before_utc < made.not_valid_after_utc


def test_a_nodes_certificate_does_not_outlast_its_ca(ca: Path, tmp_path: Path) -> None:
    until = []
    for days in (20, 90):
        issue_node(ca, ["10.0.0.1"], tmp_path / "one", days)
        made = x509.load_pem_x509_certificate((tmp_path / "one" / "ray_tls_cert.pem").read_bytes())
        until.append(made.not_valid_after_utc)
    assert until[1] == x509.load_pem_x509_certificate((ca / CA_CERT).read_bytes()).not_valid_after_utc
    assert until[0] < until[1]


def test_the_files_are_private_and_named_by_rays_variables(ca: Path, tmp_path: Path) -> None:
    out = tmp_path / "node"
    variables = issue_node(ca, ["10.0.0.1"], out, 20)
    assert variables == {"RAY_USE_TLS": "1", **{name: str(out / file) for name, file in NODE_FILES.items()}}
    assert {path.name for path in out.iterdir()} == set(NODE_FILES.values())  # and not the CA's key
    for path in (out / NODE_FILES["RAY_TLS_SERVER_KEY"], ca / CA_KEY):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(out.stat().st_mode) == 0o700


def test_a_node_is_renewed_and_a_ca_is_not_overwritten(ca: Path, tmp_path: Path) -> None:
    issue_node(ca, ["10.0.0.1"], tmp_path / "node", 20)
    before = (tmp_path / "node" / "ray_tls_cert.pem").read_bytes()
    shake(*[issue_node(ca, ["10.0.0.1"], tmp_path / "node", 20)] * 2, "10.0.0.1")
    assert (tmp_path / "node" / "ray_tls_cert.pem").read_bytes() != before
    key = (ca / CA_KEY).read_bytes()
    with pytest.raises(KeyFileError, match=r"ray_ca_key\.pem exists and is not overwritten"):
        make_ca(ca, 30)
    assert (ca / CA_KEY).read_bytes() == key


def test_a_ca_whose_files_cannot_be_used_is_refused(ca: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"ray_ca_key.pem does not exist: run `isthmus cloud ray-ca` first"):
        issue_node(tmp_path / "none", ["10.0.0.1"], tmp_path / "node", 20)
    key, certificate = ca / CA_KEY, ca / CA_CERT
    good = key.read_bytes(), certificate.read_bytes()
    key.chmod(0o644)
    with pytest.raises(KeyFileError, match="can be read by others"):
        issue_node(ca, ["10.0.0.1"], tmp_path / "node", 20)
    key.chmod(0o600)
    for path, data, said in (
        (key, b"nonsense", "cannot be used"),
        (certificate, b"nonsense", "cannot be used"),
        (key, of_another_kind(), "of another kind"),
    ):
        path.write_bytes(data)
        with pytest.raises(KeyFileError, match=said):
            issue_node(ca, ["10.0.0.1"], tmp_path / "node", 20)
        key.write_bytes(good[0])
        certificate.write_bytes(good[1])
    assert not (tmp_path / "node").exists()
    issue_node(ca, ["10.0.0.1"], tmp_path / "node", 20)


def of_another_kind() -> bytes:
    key = ed25519.Ed25519PrivateKey.generate()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
