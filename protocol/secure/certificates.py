"""Certificates: the root's word for a worker's key, direct or by way of an issuer.

Theory of operation
    root  signs  "isthmus v1 worker certificate\0" | worker key | expiry u64                a cloud on one machine
    root  signs  "isthmus v1 issuer certificate\0" | issuer key | expiry u64                a cloud on several machines:
    issuer signs "isthmus v1 worker certificate\0" | worker key | expiry u64                the root stays offline
    node  signs  "isthmus v1 certificate request\0" | cloud (32) | worker key | asked at u64

    An edge pins the root in either case. An issuer's certificate lasts days and a worker's hours, so that a stolen key
    is worth little for long. A worker's certificate never outlasts its issuer's.
    A worker makes its key itself, on its node; the node's key, which the owner has enrolled, signs the request.
"""

from __future__ import annotations

import base64
import json
import struct
import time
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from isthmus.common.errors import ConfigError, FingerprintError, IsthmusError, NotEnrolledError

_WORKER_LABEL = b"isthmus v1 worker certificate\0"
_ISSUER_LABEL = b"isthmus v1 issuer certificate\0"
_REQUEST_LABEL = b"isthmus v1 certificate request\0"
_ISSUER = struct.Struct("!32sQ64s")
ISSUER_BYTES = _ISSUER.size
"""Of an issuer's certificate beside the root's key that it hangs on."""
REQUEST_SECONDS = 600
"""How old a certificate request may be, and how far ahead its node's clock: so an old one cannot be sent again."""
_LAST_DATE = 253_402_300_799  # the end of the year 9999, after which there are no dates to show


@dataclass(frozen=True, slots=True)
class IssuerCertificate:
    """The root's word that an issuer's key (raw, 32 bytes) may certify workers until `not_after` (Unix seconds)."""

    issuer: bytes
    not_after: int
    signature: bytes

    @classmethod
    def issue(cls, root_key: Ed25519PrivateKey, issuer: bytes, not_after: int) -> IssuerCertificate:
        """Sign an issuer's raw public key."""
        return cls(issuer, not_after, root_key.sign(_signed(_ISSUER_LABEL, issuer, not_after)))

    def verify(self, root: bytes, now: float) -> None:
        """Check the signature of a root's raw key, and the expiry.

        Raises:
            FingerprintError: it does not verify, or has expired.
        """
        _verify(root, self.signature, _signed(_ISSUER_LABEL, self.issuer, self.not_after), "issuer")
        if now >= self.not_after:
            raise FingerprintError(
                f"the certificate of the cloud's issuer expired at {_date(self.not_after)}: its owner renews it with "
                "`isthmus cloud issuer` (or this machine's clock is wrong)"
            )

    def to_bytes(self) -> bytes:
        """Write it in `ISSUER_BYTES` bytes."""
        return _ISSUER.pack(self.issuer, self.not_after, self.signature)

    @classmethod
    def from_bytes(cls, data: bytes) -> IssuerCertificate:
        """Read it; its signature is not checked here.

        Raises:
            ConfigError: it has another length.
        """
        if len(data) != ISSUER_BYTES:
            raise ConfigError(f"an issuer's certificate has {ISSUER_BYTES} bytes, not {len(data)}")
        return cls(*_ISSUER.unpack(data))


@dataclass(frozen=True, slots=True)
class WorkerCertificate:
    """The word that a worker's key (raw, 32 bytes) is good until `not_after` (Unix seconds).

    It is the issuer's where there is one, and else the root's.
    """

    root: bytes
    worker: bytes
    not_after: int
    signature: bytes
    issuer: IssuerCertificate | None = None

    @classmethod
    def issue(cls, root_key: Ed25519PrivateKey, worker: bytes, not_after: int) -> WorkerCertificate:
        """Have the root sign a worker's raw public key."""
        root = root_key.public_key().public_bytes_raw()
        return cls(root, worker, not_after, root_key.sign(_signed(_WORKER_LABEL, worker, not_after)))

    @classmethod
    def issue_by(
        cls, issuer_key: Ed25519PrivateKey, issuer: IssuerCertificate, root: bytes, worker: bytes, not_after: int
    ) -> WorkerCertificate:
        """Have an issuer sign a worker's raw public key, until its own certificate expires at most."""
        until = min(not_after, issuer.not_after)
        return cls(root, worker, until, issuer_key.sign(_signed(_WORKER_LABEL, worker, until)), issuer)

    def verify(self, now: float) -> None:
        """Check the signatures and the expiry. Whether the root is the right one is the caller's question.

        Raises:
            FingerprintError: a signature does not verify, or a certificate has expired.
        """
        signer = self.root
        if self.issuer is not None:
            self.issuer.verify(self.root, now)
            signer = self.issuer.issuer
        _verify(signer, self.signature, _signed(_WORKER_LABEL, self.worker, self.not_after), "worker")
        if now >= self.not_after:
            remedy = "its owner renews it with `isthmus cloud keygen`"
            if self.issuer is not None:
                remedy = "its owner looks with `isthmus cloud doctor` why it was not renewed"
            raise FingerprintError(
                f"the worker's certificate expired at {_date(self.not_after)}: {remedy} (or this machine's clock is "
                "wrong)"
            )

    def to_json(self) -> str:
        """Write the certificate as JSON."""
        encoded = {name: base64.b64encode(getattr(self, name)).decode() for name in ("root", "worker", "signature")}
        if self.issuer is not None:
            encoded["issuer"] = base64.b64encode(self.issuer.to_bytes()).decode()
        return json.dumps({"version": 1, "not_after": self.not_after, **encoded}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> WorkerCertificate:
        """Read a certificate; its signatures are not checked here.

        Raises:
            ConfigError: it is malformed.
        """
        try:
            data = json.loads(text)
            root, worker, signature = (
                base64.b64decode(data[name], validate=True) for name in ("root", "worker", "signature")
            )
            not_after = data["not_after"]
            given = data.get("issuer")
            issuer = None if given is None else IssuerCertificate.from_bytes(base64.b64decode(given, validate=True))
        except (ValueError, KeyError, TypeError, RecursionError) as error:  # a ConfigError is a ValueError
            raise ConfigError("it is not a worker's certificate") from error
        sizes = (len(root), len(worker), len(signature)) == (32, 32, 64)
        if data.get("version") != 1 or not sizes or type(not_after) is not int or not 0 <= not_after < 1 << 63:
            raise ConfigError("it is not a worker's certificate of version 1")
        return cls(root, worker, not_after, signature, issuer)


@dataclass(frozen=True, slots=True)
class CertificateRequest:
    """A worker's request to be certified, signed by the key of its node.

    Attributes:
        cloud: digest of the fingerprint of the cloud's root key: a request to one cloud is none to another.
        worker: the worker's raw public key.
        node: the node's raw public key.
        asked_at: when it was made, in Unix seconds.
        signature: the node's.
    """

    cloud: bytes
    worker: bytes
    node: bytes
    asked_at: int
    signature: bytes

    @classmethod
    def make(cls, node_key: Ed25519PrivateKey, cloud: bytes, worker: bytes, now: float) -> CertificateRequest:
        """Sign a request for a worker's raw public key."""
        asked_at = int(now)
        signature = node_key.sign(_request(cloud, worker, asked_at))
        return cls(cloud, worker, node_key.public_key().public_bytes_raw(), asked_at, signature)

    def verify(self, cloud: bytes, now: float) -> None:
        """Check that the node has signed this for a cloud, and lately. Whether it is enrolled is the caller's question.

        Raises:
            NotEnrolledError: it has not signed this for that cloud.
            IsthmusError: it has, but not lately.
        """
        if self.cloud != cloud:
            raise NotEnrolledError("a worker asks for a certificate of another cloud")
        try:
            Ed25519PublicKey.from_public_bytes(self.node).verify(
                self.signature, _request(cloud, self.worker, self.asked_at)
            )
        except (InvalidSignature, ValueError) as error:
            raise NotEnrolledError("a worker asks for a certificate, and its node has not signed that") from error
        if abs(now - self.asked_at) > REQUEST_SECONDS:
            here = _date(int(now))
            raise IsthmusError(f"its request is of {_date(self.asked_at)}, and here it is {here}: set the wrong clock")


def _request(cloud: bytes, worker: bytes, asked_at: int) -> bytes:
    return _REQUEST_LABEL + cloud + worker + struct.pack("!Q", asked_at)


def _signed(label: bytes, key: bytes, not_after: int) -> bytes:
    return label + key + struct.pack("!Q", not_after)


def _verify(signer: bytes, signature: bytes, signed: bytes, whose: str) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(signer).verify(signature, signed)
    except (InvalidSignature, ValueError) as error:
        by = "root key" if whose == "issuer" else "key"
        raise FingerprintError(
            f"the {whose}'s certificate is not signed by the {by} that it names: do not trust this server"
        ) from error


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(min(seconds, _LAST_DATE)))
