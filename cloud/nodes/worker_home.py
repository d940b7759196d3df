"""A worker's folder on its node: its key, and files of what the controller has delivered.

$ISTHMUS_NODE_HOME, or ~/.isthmus/node
    node_key, node_key.pub              the node's key (`isthmus cloud node-keygen`), which the owner enrols
    models/<digest>/                    models that were fetched from other nodes, until another one needs the room
    <cloud>/worker-N/worker_key         made here, and never sent anywhere
                    /worker_cert, authorized_edges, authorized_workers, next_stage      as delivered
                    /adapters           the tenants'
                    /logs               of this worker
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.cloud.nodes.deliveries import Delivery
from isthmus.cloud.telemetry.logs import log
from isthmus.common.errors import ConfigError, FingerprintError, KeyFileError
from isthmus.common.files import disk_errors, write_atomic
from isthmus.protocol.enrolment import REVOKED_FILE, WORKERS_FILE
from isthmus.protocol.secure.certificates import REQUEST_SECONDS, CertificateRequest, WorkerCertificate
from isthmus.protocol.secure.keyfiles import check_folder, locked_folder, make_folder, read_private
from isthmus.protocol.secure.keys import WORKER_CERT, WORKER_KEY, load_node, make_worker_key

NEXT_STAGE, EDGES = "next_stage", "authorized_edges"
RENEW_SHARE = 0.5
"""A certificate is renewed once so much of its time has passed, and as much is left for a controller that is away."""


def node_home() -> Path:
    """The folder of this node."""
    configured = os.environ.get("ISTHMUS_NODE_HOME")
    return Path(configured).expanduser() if configured else Path.home() / ".isthmus" / "node"


class WorkerHome:
    """The folder of one worker of one cloud.

    Args:
        cloud: the cloud's name, and the digest of the fingerprint of its root key.
        number: of the worker.
        now: Unix seconds.

    Attributes:
        folder: where it is.
        key: the worker's private key, made where there was none that can be used.

    Raises:
        KeyFileError: the node has no key, or a key or the folder cannot be used.
    """

    def __init__(self, cloud: tuple[str, bytes], number: int, now: Callable[[], float] = time.time) -> None:
        name, self._cloud = cloud
        self.folder = node_home() / f"{name}-{self._cloud.hex()[:12]}" / f"worker-{number}"
        self._now = now
        self._node_key = load_node(node_home())  # first of all: without it no worker can run on this node
        make_folder(self.folder)
        check_folder(self.folder)
        self.key: Ed25519PrivateKey = _own_key(self.folder)
        self._renew_at = 0.0
        self._request: CertificateRequest | None = None
        self._take_certificate()

    @property
    def public_key(self) -> bytes:
        """The worker's raw public key."""
        return self.key.public_key().public_bytes_raw()

    @property
    def is_certified(self) -> bool:
        """Whether there is a certificate that is good now."""
        return self._renew_at > 0

    @property
    def wants_certificate(self) -> bool:
        """Whether there is none, or one that should be renewed."""
        return self._now() >= self._renew_at

    def request(self) -> CertificateRequest:
        """A request for a certificate, which is a proof as well that this key is of a worker on this node."""
        if self._request is None or abs(self._now() - self._request.asked_at) > REQUEST_SECONDS / 4:
            self._request = CertificateRequest.make(self._node_key, self._cloud, self.public_key, self._now())
        return self._request

    def write(self, delivery: Delivery) -> None:
        """Write what was delivered, as files. What is there already stays untouched.

        A certificate for another key, of another node that this worker was on, is not written: the one here may be
        good.

        Raises:
            DiskError: a file cannot be read or written; those before it are written.
        """
        for name, text in (
            (WORKER_CERT, delivery.certificate if self._of_this_key(delivery.certificate) else None),
            (REVOKED_FILE, delivery.revoked_edges or None),  # an empty list takes no key back
            (EDGES, delivery.authorized_edges),
            (WORKERS_FILE, delivery.workers),
            (NEXT_STAGE, delivery.next_stage),
        ):
            path = self.folder / name
            with disk_errors(path):
                if text is not None and text.encode() != (path.read_bytes() if path.exists() else None):
                    write_atomic(path, text.encode(), 0o644)
        self._take_certificate()

    def _of_this_key(self, text: str) -> WorkerCertificate | None:
        """A certificate for this worker's key; None where a text is no such one."""
        try:
            certificate = WorkerCertificate.from_json(text)
        except ConfigError:
            return None
        return certificate if certificate.worker == self.public_key else None

    def _take_certificate(self) -> None:
        """Look whether the certificate on the disk is this key's, and when it is to be renewed."""
        path = self.folder / WORKER_CERT
        self._renew_at = 0.0
        try:
            certificate = self._of_this_key(path.read_text())
            if certificate is not None:
                certificate.verify(self._now())
        except (OSError, UnicodeDecodeError, FingerprintError):
            return
        if certificate is not None:
            written = path.stat().st_mtime
            self._renew_at = written + RENEW_SHARE * (certificate.not_after - written)


def _own_key(folder: Path) -> Ed25519PrivateKey:
    """The worker's key, made where there is none, or another one in place of what is no key, as a crash may leave it.

    Nothing is lost with such a file: the next certificate is for the new key. A key that others can read stays refused.
    """
    path = folder / WORKER_KEY
    with locked_folder(folder):  # a second process must not remove the key that the first has made
        try:
            return make_worker_key(folder)
        except KeyFileError as error:
            if not path.exists():  # it could not be made
                raise
            read_private(path, "remove it, and it is made anew")
            log("worker_key_made_anew", logging.WARNING, error=str(error))
        with disk_errors(path):
            path.unlink()
        return make_worker_key(folder)
