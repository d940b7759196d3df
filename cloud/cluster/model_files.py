"""The model's files, handed out by the controller: its machine has the model, and takes no workers.

It speaks what workers speak, over sealed sessions, to workers of enrolled nodes alone, and answers for files alone.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.cloud.cluster.cluster_spec import ClusterSpec
from isthmus.cloud.cluster.issuing import HOUR, IssuingOffice
from isthmus.cloud.control.ray_cluster import node_address
from isthmus.common.readable import bracketed
from isthmus.protocol.enrolment import WORKERS_QUOTA_BYTES, WORKERS_QUOTA_SESSIONS, AuthorizedEdges, Quota, Tenant
from isthmus.protocol.secure.keys import Fingerprint, WorkerIdentity

_QUOTA = Quota(WORKERS_QUOTA_SESSIONS, WORKERS_QUOTA_BYTES)


class ModelFiles:
    """A small gateway beside the controller.

    Args:
        spec: the cloud.
        office: certifies the gateway's own key.
        known: tells the raw keys of workers that may fetch.
    """

    def __init__(self, spec: ClusterSpec, office: IssuingOffice, known: Callable[[], Sequence[bytes]]) -> None:
        self._spec, self._office, self._known = spec, office, known
        self._key = Ed25519PrivateKey.generate()
        self._identity: WorkerIdentity | None = None

    def start(self) -> str:
        """Listen on this node's address; returns `host:port`, "" where the model is a saved span."""
        worker = self._spec.worker.worker
        if worker.saved_span:
            return ""
        from pathlib import Path

        from isthmus.cloud.gateway.file_gateway import FileGateway
        from isthmus.cloud.session.file_store import HashedLater
        from isthmus.protocol.messages import FileSet

        store = HashedLater(Path(worker.checkpoint), FileSet.MODEL)
        gateway = FileGateway(
            worker.model, self._spec.worker.digest, {FileSet.MODEL: store}, self.identity, self._edges
        )
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="model-files", daemon=True).start()
        own = bracketed(node_address())
        port = asyncio.run_coroutine_threadsafe(gateway.start(f"{own}:{self._spec.model_port}"), loop).result()
        return f"{own}:{port}"

    def identity(self) -> WorkerIdentity:
        """This gateway's key and a certificate, renewed when half of its time has passed."""
        now, half = time.time(), self._spec.hours * HOUR / 2
        if self._identity is None or self._identity.certificate.not_after - now < half:
            public = self._key.public_key().public_bytes_raw()
            issued = self._office.issuer().issue(public, now + self._spec.hours * HOUR)
            self._identity = WorkerIdentity(self._key, issued)
        return self._identity

    def _edges(self) -> AuthorizedEdges:
        return AuthorizedEdges(
            {
                key: Tenant(f"worker-{number}", Fingerprint.of(key), _QUOTA, stage=True)
                for number, key in enumerate(self._known())
            }
        )
