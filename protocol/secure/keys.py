"""Keys: who is who, and the files that say so.

Rules
    1. A private key's file has mode 0600 and is never overwritten; one that others can read is refused.
    2. The root's private key signs workers and lies on no worker. An edge pins the root's fingerprint.
    3. The root's and the issuer's key are made with a passphrase unless it is declined; a worker's and an edge's on
       request. Whoever loads one says where the passphrase comes from (`isthmus.protocol.secure.passphrases`).
    4. An edge is enrolled by a line in `authorized_edges`, as in SSH; a node of a cloud on several machines by one in
       `authorized_nodes`.

Theory of operation
    root_key         Ed25519 private key (PKCS8 PEM, 0600)    the cloud owner's; signs workers' certificates
    root_key.pub     its public key (OpenSSH)                 `ssh-keygen -lf root_key.pub` shows what edges pin
    worker_key       Ed25519 private key (PKCS8 PEM, 0600)    a worker's
    worker_cert      JSON: root's and worker's public keys, expiry (Unix seconds), root's signature over the last two
    issuer_key       Ed25519 private key (PKCS8 PEM, 0600)    signs workers on several machines in the root's place
    issuer_cert      JSON: root's public key, and the issuer's certificate (`isthmus.protocol.secure.certificates`)
    node_key         Ed25519 private key (OpenSSH, 0600)      a node's; signs its workers' requests; `.pub` beside it
    authorized_edges `[max-sessions=N,max-bytes-in-flight=SIZE] ssh-ed25519 AAAA... name`, one line per edge
    authorized_nodes `ssh-ed25519 AAAA... name`, one line per node
    an edge's key    Ed25519 private key (OpenSSH, with a passphrase PKCS8 PEM; 0600), and `.pub` beside it

    A fingerprint is SHA-256 over the algorithm's name and the key in OpenSSH's encoding, so that a later algorithm
    gives other fingerprints. The signature of a certificate covers a label, so that it can be taken for nothing else.
"""

from __future__ import annotations

import base64
import hmac
import json
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

from isthmus.common.errors import ConfigError, FingerprintError, IsthmusError, KeyFileError
from isthmus.protocol.secure.certificates import IssuerCertificate, WorkerCertificate
from isthmus.protocol.secure.keyfiles import create_file, make_folder, read_private, read_text, replace_file
from isthmus.protocol.secure.passphrases import Passphrase

ALGORITHM = b"ssh-ed25519"
ROOT_KEY, ROOT_PUB, WORKER_KEY, WORKER_CERT = "root_key", "root_key.pub", "worker_key", "worker_cert"
ISSUER_KEY, ISSUER_CERT, NODE_KEY = "issuer_key", "issuer_cert", "node_key"
DAY = 86_400
OF_ROOT, OF_ISSUER, OF_WORKER = Passphrase("root"), Passphrase("issuer"), Passphrase("worker")
OF_EDGE = Passphrase("edge", asks=True)
"""Where the passphrases of keys come from that have one, for whoever loads them and knows nothing better."""
_CLOUD_REMEDY = "run `isthmus cloud keygen`"
_EDGE_REMEDY = "run `isthmus edge keygen`"
_ISSUER_REMEDY = "run `isthmus cloud issuer` where the root key is"
_NODE_REMEDY = "run `isthmus cloud node-keygen` on this node"
_ENCRYPTED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"
# What the library raises on a private key that is none; the last one comes from OpenSSL, on a key of another algorithm.
_MALFORMED = (ValueError, TypeError, UnsupportedAlgorithm, InternalError)


def ssh_blob(public_key: bytes) -> bytes:
    """Encode a raw Ed25519 public key (32 bytes) as OpenSSH does: the algorithm's name and the key, with lengths."""
    return struct.pack("!I", len(ALGORITHM)) + ALGORITHM + struct.pack("!I", len(public_key)) + public_key


def parse_public_key(text: str) -> tuple[bytes, str]:
    """Read `ssh-ed25519 AAAA... comment`.

    Returns:
        The raw public key (32 bytes) and the comment, which may be empty.

    Raises:
        ConfigError: it is malformed, or a key of another algorithm.
    """
    words = text.split(None, 2)
    if len(words) < 2 or words[0] != ALGORITHM.decode():
        raise ConfigError(f"{text[:60]!r} is not an Ed25519 public key: `ssh-ed25519 AAAA... name` is needed")
    try:
        blob = base64.b64decode(words[1], validate=True)
    except ValueError as error:  # of base64, or of letters that are not ASCII
        raise ConfigError(f"the public key {words[1][:60]!r} is not base64") from error
    key = blob[-32:]
    if blob != ssh_blob(key):
        raise ConfigError(f"the public key {words[1][:60]!r} is not an Ed25519 key in OpenSSH's encoding")
    return key, words[2].strip() if len(words) > 2 else ""


def format_public_key(public_key: bytes, comment: str) -> str:
    """Write `ssh-ed25519 AAAA... comment`, without a line end."""
    return f"{ALGORITHM.decode()} {base64.b64encode(ssh_blob(public_key)).decode()} {comment}".rstrip()


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The SHA-256 of an algorithm's name and a public key, written `SHA256:<base64 without padding>`."""

    digest: bytes

    @classmethod
    def of(cls, public_key: bytes) -> Fingerprint:
        """Compute the fingerprint of a raw Ed25519 public key (32 bytes)."""
        return cls(sha256(ssh_blob(public_key)).digest())

    @classmethod
    def parse(cls, text: str) -> Fingerprint:
        """Read a fingerprint.

        Raises:
            ConfigError: it is malformed.
        """
        kind, _, encoded = text.strip().partition(":")
        try:
            digest = base64.b64decode(encoded + "=", validate=True)
        except ValueError:
            digest = b""
        if kind != "SHA256" or len(digest) != 32 or str(cls(digest)) != text.strip():
            raise ConfigError(f"{text!r} is not a fingerprint: `SHA256:` and 43 characters of base64 are needed")
        return cls(digest)

    def matches(self, other: Fingerprint) -> bool:
        """Compare in constant time."""
        return hmac.compare_digest(self.digest, other.digest)

    def __str__(self) -> str:
        return "SHA256:" + base64.b64encode(self.digest).decode().rstrip("=")


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """What a worker needs to prove who it is: its private key and its certificate."""

    key: Ed25519PrivateKey
    certificate: WorkerCertificate

    @property
    def pin(self) -> Fingerprint:
        """The root's fingerprint, which edges pin."""
        return Fingerprint.of(self.certificate.root)


def generate_root(folder: Path, passphrase: Passphrase | None = None) -> Fingerprint:
    """Make the root key in `folder` (`root_key`, `root_key.pub`), with a passphrase or none; return its fingerprint.

    Raises:
        KeyFileError: there is a root key already, or it cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw()
    make_folder(folder)
    create_file(folder / ROOT_KEY, _pem(key, folder / ROOT_KEY, passphrase), mode=0o600)
    replace_file(folder / ROOT_PUB, (format_public_key(public, "isthmus-root") + "\n").encode(), mode=0o644)
    return Fingerprint.of(public)


def issue_worker(
    folder: Path,
    days: float = 90,
    now: Callable[[], float] = time.time,
    root: Passphrase = OF_ROOT,
    new: Passphrase | None = None,
) -> WorkerCertificate:
    """Certify the worker's key in `folder` with the root key there, making the worker's key where there is none.

    Calling it again renews the certificate. A worker needs a folder with `worker_key` and `worker_cert` only.

    Args:
        folder: The cloud owner's.
        days: Until the certificate expires.
        now: Unix seconds.
        root: The root key's passphrase.
        new: The worker key's; None for a new key without one.

    Raises:
        KeyFileError: the root's or worker's key is missing, malformed, or readable by others.
    """
    root_key = _load_pem(folder / ROOT_KEY, _CLOUD_REMEDY, root)
    worker = make_worker_key(folder, new).public_key().public_bytes_raw()
    certificate = WorkerCertificate.issue(root_key, worker, int(now() + days * DAY))
    replace_file(folder / WORKER_CERT, certificate.to_json().encode(), mode=0o644)
    return certificate


def make_worker_key(folder: Path, passphrase: Passphrase | None = None) -> Ed25519PrivateKey:
    """The worker's key in `folder`, made where there is none, with a passphrase or without.

    Raises:
        KeyFileError: it is malformed, readable by others, or cannot be made.
    """
    path = folder / WORKER_KEY
    if not path.exists():
        create_file(path, _pem(Ed25519PrivateKey.generate(), path, passphrase), mode=0o600)
    return _load_pem(path, _CLOUD_REMEDY, passphrase or OF_WORKER)


def load_worker(
    folder: Path, now: Callable[[], float] = time.time, passphrase: Passphrase = OF_WORKER
) -> WorkerIdentity:
    """Load a worker's key and certificate.

    Raises:
        KeyFileError: one is missing, malformed, readable by others, or expired, or they do not belong together.
    """
    key = _load_pem(folder / WORKER_KEY, _CLOUD_REMEDY, passphrase)
    path = folder / WORKER_CERT
    try:
        certificate = WorkerCertificate.from_json(read_text(path, _CLOUD_REMEDY, ours=True))
        certificate.verify(now())
    except (ConfigError, FingerprintError) as error:
        raise KeyFileError(f"{path}: {error}; {_CLOUD_REMEDY} to make it anew") from error
    if certificate.worker != key.public_key().public_bytes_raw():
        raise KeyFileError(
            f"{path}: the certificate is for another key than {WORKER_KEY}; {_CLOUD_REMEDY} to make it anew"
        )
    return WorkerIdentity(key, certificate)


@dataclass(frozen=True, slots=True)
class Issuer:
    """What signs workers' certificates in the root's place: its private key, its certificate, the root's raw key."""

    key: Ed25519PrivateKey
    certificate: IssuerCertificate
    root: bytes

    @property
    def pin(self) -> Fingerprint:
        """The root's fingerprint, which edges pin."""
        return Fingerprint.of(self.root)

    def issue(self, worker: bytes, not_after: float) -> WorkerCertificate:
        """Certify a worker's raw public key until then (Unix seconds), or until this issuer's certificate expires."""
        return WorkerCertificate.issue_by(self.key, self.certificate, self.root, worker, int(not_after))


def make_issuer(
    folder: Path,
    days: float = 7,
    now: Callable[[], float] = time.time,
    root: Passphrase = OF_ROOT,
    new: Passphrase | None = None,
) -> IssuerCertificate:
    """Certify the issuer's key in `folder` with the root key there, making the issuer's key where there is none.

    Calling it again renews the certificate.

    Args:
        folder: The cloud owner's.
        days: Until the certificate expires.
        now: Unix seconds.
        root: The root key's passphrase.
        new: The issuer key's; None for a new key without one.

    Raises:
        KeyFileError: the root's or the issuer's key is missing, malformed, or readable by others.
    """
    root_key = _load_pem(folder / ROOT_KEY, _CLOUD_REMEDY, root)
    path = folder / ISSUER_KEY
    if not path.exists():
        create_file(path, _pem(Ed25519PrivateKey.generate(), path, new), mode=0o600)
    issuer = _load_pem(path, _ISSUER_REMEDY, new or OF_ISSUER).public_key().public_bytes_raw()
    certificate = IssuerCertificate.issue(root_key, issuer, int(now() + days * DAY))
    signer = root_key.public_key().public_bytes_raw()
    encoded = [base64.b64encode(data).decode() for data in (signer, certificate.to_bytes())]
    shown = {"version": 1, **dict(zip(("root", "issuer"), encoded, strict=True))}
    replace_file(folder / ISSUER_CERT, (json.dumps(shown, indent=1) + "\n").encode(), mode=0o644)
    return certificate


def load_issuer(folder: Path, now: Callable[[], float] = time.time, passphrase: Passphrase = OF_ISSUER) -> Issuer:
    """Load an issuer's key and certificate.

    Raises:
        KeyFileError: one is missing, malformed, readable by others, or expired, or they do not belong together.
    """
    key = _load_pem(folder / ISSUER_KEY, _ISSUER_REMEDY, passphrase)
    path = folder / ISSUER_CERT
    text = read_text(path, _ISSUER_REMEDY, ours=True)
    try:
        data = json.loads(text)
        root, packed = (base64.b64decode(data[name], validate=True) for name in ("root", "issuer"))
        certificate = IssuerCertificate.from_bytes(packed)
        certificate.verify(root, now())
    except (ValueError, KeyError, TypeError, RecursionError, FingerprintError) as error:
        why = error if isinstance(error, IsthmusError) else "it is not an issuer's certificate"
        raise KeyFileError(f"{path}: {why}; {_ISSUER_REMEDY} to make it anew") from error
    if certificate.issuer != key.public_key().public_bytes_raw():
        raise KeyFileError(
            f"{path}: the certificate is for another key than {ISSUER_KEY}; {_ISSUER_REMEDY} to make it anew"
        )
    return Issuer(key, certificate, root)


def load_node(folder: Path) -> Ed25519PrivateKey:
    """Load a node's private key. Raises KeyFileError as `load_edge` does."""
    return _load_openssh(folder / NODE_KEY, _NODE_REMEDY)


def generate_edge(path: Path, comment: str, passphrase: Passphrase | None = None) -> str:
    """Make an edge's or a node's key at `path`, its public key beside it (`path.pub`); return the line to enrol.

    With a passphrase it is in PKCS8 PEM, as OpenSSH's own format needs another library for that.

    Raises:
        KeyFileError: there is a key already, or it cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    line = format_public_key(key.public_key().public_bytes_raw(), comment)
    make_folder(path.parent)
    plain = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    create_file(path, plain if passphrase is None else _pem(key, path, passphrase), mode=0o600)
    replace_file(path.with_name(path.name + ".pub"), (line + "\n").encode(), mode=0o644)
    return line


def load_edge(path: Path) -> Ed25519PrivateKey:
    """Load an edge's private key.

    Raises:
        KeyFileError: it is missing, malformed, or readable by others; or it does not open with its passphrase.
    """
    if _ENCRYPTED in read_private(path, _EDGE_REMEDY):
        return _load_pem(path, _EDGE_REMEDY, OF_EDGE)
    return _load_openssh(path, _EDGE_REMEDY)


def _load_openssh(path: Path, remedy: str) -> Ed25519PrivateKey:
    raw = read_private(path, remedy)
    try:
        key = load_ssh_private_key(raw, password=None)
    except _MALFORMED as error:
        raise KeyFileError(
            f"{path} is not a private key in OpenSSH format without a passphrase ({error}); "
            f"{remedy} to make one elsewhere"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"{path} is not an Ed25519 key; {remedy} to make one elsewhere")
    return key


def _pem(key: Ed25519PrivateKey, path: Path, passphrase: Passphrase | None) -> bytes:
    """The file of a new key that goes to `path`. Raises KeyFileError where there is no passphrase to be had."""
    sealing = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase.for_new(path))
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, sealing)


def _load_pem(path: Path, remedy: str, passphrase: Passphrase) -> Ed25519PrivateKey:
    raw = read_private(path, remedy)
    given = passphrase.of(path) if _ENCRYPTED in raw else None
    try:
        key = load_pem_private_key(raw, given)
    except _MALFORMED as error:
        if given is not None:
            raise passphrase.wrong(path) from error
        raise KeyFileError(
            f"{path} is not a private key in PEM format ({error}); {remedy} in an empty folder"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"{path} is not an Ed25519 key; {remedy} in an empty folder")
    return key
