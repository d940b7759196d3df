"""What a cloud's controller sends a worker on a node, and what the worker asks for. Pure.

All of it goes through Ray as arguments and results of actors' methods, which Ray keeps nowhere. Nothing of it is
secret: certificates, public keys, enrolments, addresses. Keys stay where they are; files go between workers, sealed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256

from isthmus.cloud.directory import Report
from isthmus.protocol.enrolment import AuthorizedEdges
from isthmus.protocol.secure.certificates import CertificateRequest
from isthmus.protocol.secure.keys import Fingerprint


@dataclass(frozen=True, slots=True)
class AdapterPlace:
    """A tenant's newest adapter, and where it is.

    Attributes:
        tenant: the fingerprint of the tenant's key, in hex.
        plugged_at: when it was plugged in, in Unix milliseconds.
        address: of a worker that has it.
    """

    tenant: str
    plugged_at: int
    address: str


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a worker needs of the rest of its cloud.

    Attributes:
        certificate: the worker's, as JSON; "" where it has to ask for one.
        authorized_edges: the tenants that may open sessions with it, as lines; None where the controller does not know
            them at present, and the worker keeps those that it has.
        workers: the cloud's other workers, in the same form and with the same meaning of None.
        next_stage: address of the pipeline's next stage; "" where there is none, or it is being started.
        models_at: addresses of workers that have the model.
        adapters: those that this worker lacks, or has older ones of.
        revoked_edges: the keys that are let in no more, as lines; None where the controller does not know them.
    """

    certificate: str = ""
    authorized_edges: str | None = None
    workers: str | None = None
    next_stage: str = ""
    models_at: tuple[str, ...] = ()
    adapters: tuple[AdapterPlace, ...] = ()
    revoked_edges: str | None = None

    @property
    def revision(self) -> str:
        """A short name of its contents: what a worker has already is not sent again."""
        return sha256(repr(self).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What a worker on a node reports.

    Attributes:
        report: as of any worker.
        key: its raw public key.
        node: name of its node, for the operator.
        place: `host:port` where other workers reach it.
        request: signed by its node, whether or not it wants a certificate: it proves which node the key belongs to.
        wants_certificate: whether it has none, or one that should be renewed.
        revision: of the delivery that it has; "" where it has none, and no delivery's where it has only a part of one.
        has_model: whether others may fetch the model there.
        adapters: when each tenant's adapter was plugged in, by the digest of the fingerprint.
        waits: what it waits for before it can serve, for the operator; "" once it serves.
        failure: why it cannot serve; "" while it may.
        fault: why it cannot keep what is delivered, in one line for the operator; "" where all is well.
        spec: digest of what it was made with; see `isthmus.cloud.nodes.node_worker.spec_digest`.
    """

    report: Report
    key: bytes
    node: str
    place: str
    request: CertificateRequest | None = None
    wants_certificate: bool = False
    revision: str = ""
    has_model: bool = False
    adapters: dict[str, int] = field(default_factory=dict)
    waits: str = ""
    failure: str = ""
    fault: str = ""
    spec: str = ""


def newer_adapters(serving: Mapping[int, NodeReport], own: NodeReport, tenants: str) -> tuple[AdapterPlace, ...]:
    """Where each enrolled tenant's newest adapter is, of those that a worker lacks or has older ones of."""
    newest: dict[str, AdapterPlace] = {}
    enrolled = AuthorizedEdges.parse(tenants) if any(report.adapters for report in serving.values()) else None
    for report in serving.values():
        for tenant, plugged_at in report.adapters.items():
            if enrolled is None or enrolled.of(Fingerprint(bytes.fromhex(tenant))) is None:
                continue
            if plugged_at > max(own.adapters.get(tenant, 0), newest[tenant].plugged_at if tenant in newest else 0):
                newest[tenant] = AdapterPlace(tenant, plugged_at, report.place)
    return tuple(newest[tenant] for tenant in sorted(newest))
