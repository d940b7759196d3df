"""Ray's own TLS and token: a check that they are on, and certificates for the TLS.

The owner makes a CA once, and it signs a certificate for each node. Ray reads them as the files that
`RAY_TLS_SERVER_CERT`, `RAY_TLS_SERVER_KEY` and `RAY_TLS_CA_CERT` name, and checks that a certificate has the name or
address that it connects to.
Source: Ray's documentation, "TLS authentication".
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from isthmus.common.errors import ConfigError, KeyFileError
from isthmus.protocol.secure.keyfiles import create_file, make_folder, read_private, read_text, replace_file

CA_KEY, CA_CERT = "ray_ca_key.pem", "ray_ca_cert.pem"
NODE_FILES = {
    "RAY_TLS_SERVER_KEY": "ray_tls_key.pem",
    "RAY_TLS_SERVER_CERT": "ray_tls_cert.pem",
    "RAY_TLS_CA_CERT": CA_CERT,
}
"""Ray's variables, and the files of a node that they name."""
_LOCAL = ("127.0.0.1", "localhost")  # a node's processes reach each other by these


def uses_tls() -> bool:
    """Whether Ray uses TLS, as this process's environment says; all processes of a cluster must have it alike."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def check_trust(addresses: Iterable[str], *, autoscaled: bool = False) -> None:
    """Check by this process's environment that Ray asks for a token, and uses TLS where its cluster gets several nodes.

    A token is needed with one node as well: `ray start` listens on all of a machine's addresses.

    Args:
        addresses: of its nodes.
        autoscaled: whether nodes are added by themselves; there may be one yet.

    Raises:
        ConfigError: the environment does not say so.
    """
    several = len(set(addresses)) > 1
    if (several or autoscaled) and not uses_tls():
        which = "the cluster has several nodes" if several else "an --autoscaled cluster gets several nodes"
        raise ConfigError(
            f"{which}, and Ray's token crosses the network between them in the clear: set RAY_USE_TLS=1 and "
            f"{', '.join(NODE_FILES)} for `ray start` on every node and for this command (`isthmus cloud "
            "ray-certificate` makes the files)"
        )
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        raise ConfigError(
            "Ray asks for no token, so whoever reaches its ports may run code: set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH for `ray start` on every node and for this command"
        )


def make_ca(folder: Path, days: int) -> None:
    """Make a CA: its key, which stays with the owner, and its certificate.

    Raises:
        KeyFileError: there is one already.
    """
    make_folder(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    create_file(folder / CA_KEY, _pem(key), mode=0o600)
    name = _name("ray cluster")
    certificate = _signed(name, name, key.public_key(), key, _after(days), ())
    replace_file(folder / CA_CERT, certificate.public_bytes(Encoding.PEM), mode=0o644)


def issue_node(ca: Path, names: Sequence[str], out: Path, days: int, at: Path | None = None) -> dict[str, str]:
    """Make a node's key and certificate, anew where there are some; returns Ray's variables.

    Args:
        ca: folder of the CA.
        names: IP addresses and host names by which other nodes reach this one.
        out: the node's folder for them.
        days: until the certificate expires; not after the CA's.
        at: where the node will have the folder; by default where it is made.

    Raises:
        KeyFileError: there is no CA there, or its files cannot be used.
    """
    remedy = "run `isthmus cloud ray-ca` first"
    try:
        ca_key = load_pem_private_key(read_private(ca / CA_KEY, remedy), password=None)
        ca_certificate = x509.load_pem_x509_certificate(read_text(ca / CA_CERT, remedy).encode())
    except ValueError as error:
        raise KeyFileError(f"the files of the CA in {ca} cannot be used ({error}): make them anew") from error
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise KeyFileError(f"{ca / CA_KEY} is of another kind than `isthmus cloud ray-ca` makes: use that one")
    key = ec.generate_private_key(ec.SECP256R1())
    until = min(_after(days), ca_certificate.not_valid_after_utc)
    certificate = _signed(ca_certificate.subject, _name(names[0]), key.public_key(), ca_key, until, names)
    make_folder(out)
    contents = {
        NODE_FILES["RAY_TLS_SERVER_KEY"]: (_pem(key), 0o600),
        NODE_FILES["RAY_TLS_SERVER_CERT"]: (certificate.public_bytes(Encoding.PEM), 0o644),
        CA_CERT: (ca_certificate.public_bytes(Encoding.PEM), 0o644),
    }
    for name, (data, mode) in contents.items():
        replace_file(out / name, data, mode)
    return {
        "RAY_USE_TLS": "1",
        **{variable: str((at or out.absolute()) / name) for variable, name in NODE_FILES.items()},
    }


def _signed(
    issuer: x509.Name,
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePrivateKey,
    until: datetime.datetime,
    names: Sequence[str],
) -> x509.Certificate:
    """A certificate; of a CA where it has no names."""
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # of nodes whose clocks are behind
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(ca=not names, path_length=None), critical=True)
    )
    if names:
        alternatives = [_alternative(each) for each in dict.fromkeys((*names, *_LOCAL))]
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    return builder.sign(signer, hashes.SHA256())


def _after(days: int) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
