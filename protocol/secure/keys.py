"""Keys: who is who, and the files that say so.

Rules
    1. A private key's file has mode 0600 and is never overwritten; one that others can read is refused.
    2. The root's private key signs workers and lies on no worker. An edge pins the root's fingerprint.
    3. An edge is enrolled by a line in `authorized_edges`, as in SSH.

Theory of operation
    root_key         Ed25519 private key (PKCS8 PEM, 0600)    the cloud owner's; signs workers' certificates
    root_key.pub     its public key (OpenSSH)                 `ssh-keygen -lf root_key.pub` shows the fingerprint that
    edges pin worker_key       Ed25519 private key (PKCS8 PEM, 0600)    a worker's
    worker_cert      JSON: root's and worker's public keys, expiry (Unix seconds), root's signature over the last two
    authorized_edges `[max-sessions=N,max-bytes-in-flight=SIZE] ssh-ed25519 AAAA... name`, one line per edge
    an edge's key    Ed25519 private key (OpenSSH, 0600), and `.pub` beside it

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

from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

from isthmus.common.errors import ConfigError, FingerprintError, KeyFileError
from isthmus.protocol.secure.keyfiles import create_file, make_folder, read_private, read_text, replace_file

ALGORITHM = b"ssh-ed25519"
ROOT_KEY, ROOT_PUB, WORKER_KEY, WORKER_CERT = "root_key", "root_key.pub", "worker_key", "worker_cert"
DAY = 86_400
_CERTIFICATE_LABEL = b"isthmus v1 worker certificate\0"
_CLOUD_REMEDY = "run `isthmus cloud keygen`"
_EDGE_REMEDY = "run `isthmus edge keygen`"
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
class WorkerCertificate:
    """The root's word that a worker's key (raw, 32 bytes) is good until `not_after` (Unix seconds)."""

    root: bytes
    worker: bytes
    not_after: int
    signature: bytes

    @classmethod
    def issue(cls, root_key: Ed25519PrivateKey, worker: bytes, not_after: int) -> WorkerCertificate:
        """Sign a worker's raw public key."""
        root = root_key.public_key().public_bytes_raw()
        return cls(root, worker, not_after, root_key.sign(cls._signed(worker, not_after)))

    @staticmethod
    def _signed(worker: bytes, not_after: int) -> bytes:
        return _CERTIFICATE_LABEL + worker + struct.pack("!Q", not_after)

    def verify(self, now: float) -> None:
        """Check the root's signature and the expiry. Whether the root is the right one is the caller's question.

        Raises:
            FingerprintError: the signature does not verify, or the certificate has expired.
        """
        try:
            signed = self._signed(self.worker, self.not_after)
            Ed25519PublicKey.from_public_bytes(self.root).verify(self.signature, signed)
        except (InvalidSignature, ValueError) as error:
            raise FingerprintError(
                "the worker's certificate is not signed by the root key that it names: do not trust this server"
            ) from error
        if now >= self.not_after:
            day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(min(self.not_after, 253_402_300_799)))
            raise FingerprintError(
                f"the worker's certificate expired at {day}: its owner renews it with `isthmus cloud keygen` "
                "(or this machine's clock is wrong)"
            )

    def to_json(self) -> str:
        """Write the certificate as JSON."""
        encoded = {name: base64.b64encode(getattr(self, name)).decode() for name in ("root", "worker", "signature")}
        return json.dumps({"version": 1, "not_after": self.not_after, **encoded}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> WorkerCertificate:
        """Read a certificate; its signature is not checked here.

        Raises:
            ConfigError: it is malformed.
        """
        try:
            data = json.loads(text)
            root, worker, signature = (
                base64.b64decode(data[name], validate=True) for name in ("root", "worker", "signature")
            )
            not_after = data["not_after"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError("it is not a worker's certificate") from error
        sizes = (len(root), len(worker), len(signature)) == (32, 32, 64)
        if data.get("version") != 1 or not sizes or type(not_after) is not int or not 0 <= not_after < 1 << 63:
            raise ConfigError("it is not a worker's certificate of version 1")
        return cls(root, worker, not_after, signature)


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """What a worker needs to prove who it is: its private key and its certificate."""

    key: Ed25519PrivateKey
    certificate: WorkerCertificate

    @property
    def pin(self) -> Fingerprint:
        """The root's fingerprint, which edges pin."""
        return Fingerprint.of(self.certificate.root)


def generate_root(folder: Path) -> Fingerprint:
    """Make the root key in `folder` (`root_key`, `root_key.pub`) and return its fingerprint.

    Raises:
        KeyFileError: there is a root key already, or it cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw()
    make_folder(folder)
    create_file(folder / ROOT_KEY, _pem(key), mode=0o600)
    replace_file(folder / ROOT_PUB, (format_public_key(public, "isthmus-root") + "\n").encode(), mode=0o644)
    return Fingerprint.of(public)


def issue_worker(folder: Path, days: float = 90, now: Callable[[], float] = time.time) -> WorkerCertificate:
    """Certify the worker's key in `folder` with the root key there, making the worker's key where there is none.

    Calling it again renews the certificate. A worker needs a folder with `worker_key` and `worker_cert` only.

    Raises:
        KeyFileError: the root's or worker's key is missing, malformed, or readable by others.
    """
    root_key = _load_pem(folder / ROOT_KEY, _CLOUD_REMEDY)
    path = folder / WORKER_KEY
    if not path.exists():
        create_file(path, _pem(Ed25519PrivateKey.generate()), mode=0o600)
    worker = _load_pem(path, _CLOUD_REMEDY).public_key().public_bytes_raw()
    certificate = WorkerCertificate.issue(root_key, worker, int(now() + days * DAY))
    replace_file(folder / WORKER_CERT, certificate.to_json().encode(), mode=0o644)
    return certificate


def load_worker(folder: Path, now: Callable[[], float] = time.time) -> WorkerIdentity:
    """Load a worker's key and certificate.

    Raises:
        KeyFileError: one is missing, malformed, readable by others, or expired, or they do not belong together.
    """
    key = _load_pem(folder / WORKER_KEY, _CLOUD_REMEDY)
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


def generate_edge(path: Path, comment: str) -> str:
    """Make an edge's key at `path` and its public key beside it (`path.pub`); return the public line for enrolment.

    Raises:
        KeyFileError: there is a key already, or it cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    line = format_public_key(key.public_key().public_bytes_raw(), comment)
    make_folder(path.parent)
    create_file(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), mode=0o600)
    replace_file(path.with_name(path.name + ".pub"), (line + "\n").encode(), mode=0o644)
    return line


def load_edge(path: Path) -> Ed25519PrivateKey:
    """Load an edge's private key.

    Raises:
        KeyFileError: it is missing, malformed, protected by a passphrase, or readable by others.
    """
    raw = read_private(path, _EDGE_REMEDY)
    try:
        key = load_ssh_private_key(raw, password=None)
    except _MALFORMED as error:
        raise KeyFileError(
            f"{path} is not a private key in OpenSSH format without a passphrase ({error}); "
            f"{_EDGE_REMEDY} to make one elsewhere"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"{path} is not an Ed25519 key; {_EDGE_REMEDY} to make one elsewhere")
    return key


def _pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _load_pem(path: Path, remedy: str) -> Ed25519PrivateKey:
    raw = read_private(path, remedy)
    try:
        key = load_pem_private_key(raw, password=None)
    except _MALFORMED as error:
        raise KeyFileError(
            f"{path} is not a private key in PEM format ({error}); {remedy} in an empty folder"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"{path} is not an Ed25519 key; {remedy} in an empty folder")
    return key
