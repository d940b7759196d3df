"""Which workers run on nodes that the owner has enrolled: their keys, and the certificates that they were given."""

from __future__ import annotations

from isthmus.cloud.cluster.issuing import IssuingOffice
from isthmus.cloud.nodes.deliveries import NodeReport
from isthmus.cloud.telemetry.logs import log
from isthmus.common.errors import NotEnrolledError
from isthmus.protocol.enrolment import STAGE_OPTIONS
from isthmus.protocol.secure.certificates import CertificateRequest, WorkerCertificate
from isthmus.protocol.secure.keys import format_public_key


class KnownWorkers:
    """The workers of one cloud, by number.

    Args:
        office: checks requests, and signs.
        cloud: digest of the fingerprint of the cloud's root key.
    """

    def __init__(self, office: IssuingOffice, cloud: bytes) -> None:
        self._office, self._cloud = office, cloud
        self._requests: dict[int, CertificateRequest] = {}
        self._keys: dict[int, bytes] = {}  # as reported last
        self._certificates: dict[int, WorkerCertificate] = {}

    def take(self, number: int, report: NodeReport) -> None:
        """Know a worker by the request of its report, and certify its key where it wants that.

        Raises:
            NotEnrolledError: its node is not enrolled, or not any more, or has not signed this; it is known no more.
            IsthmusError: it gets no certificate for another reason; what it has may be good yet, and it stays known.
        """
        self._keys[number] = report.key
        request = report.request
        if request is None:
            return
        try:
            if request != self._requests.get(number):
                self._office.check(request, self._cloud)
                if request.worker != report.key:
                    raise NotEnrolledError("it asks for another key than its own")
                self._requests[number] = request
            if report.wants_certificate and not report.fault:  # it could not keep another one, and asks in every round
                self._certify(number, request, report.node)
        except NotEnrolledError:
            self.forget(number)
            raise

    def _certify(self, number: int, request: CertificateRequest, node: str) -> None:
        granted = self._office.grant(request)
        if granted != self._certificates.get(number):  # the same again where the issuer's ends soon
            self._certificates[number] = granted
            log("certificate_issued", worker=number, node=node)

    def forget(self, number: int) -> None:
        """Let a worker's key in no more, and hand out no certificate for it."""
        for known in (self._requests, self._keys, self._certificates):
            known.pop(number, None)

    def forget_revoked(self) -> None:
        """Forget all workers whose node is enrolled no more, whether or not they answer."""
        nodes = self._office.nodes()
        for number, request in list(self._requests.items()):
            if nodes is not None and nodes.find(request.node) is None:
                self.forget(number)

    def certificate(self, number: int) -> str:
        """The certificate that a worker was given last, as JSON; "" where it was given none for its present key.

        A worker that was moved to another node has another key there, and may have a good certificate for it.
        """
        certificate = self._certificates.get(number)
        return certificate.to_json() if certificate and certificate.worker == self._keys.get(number) else ""

    def keys(self) -> tuple[bytes, ...]:
        """All workers' raw public keys. May be called from any thread."""
        return tuple(request.worker for request in self._requests.copy().values())

    def lines_beside(self, number: int) -> str | None:
        """The other workers' keys as lines of enrolments; None where nobody knows which nodes are enrolled."""
        if self._office.fault and not self._requests:
            return None
        others = [(n, request.worker) for n, request in sorted(self._requests.items()) if n != number]
        return "".join(f"{STAGE_OPTIONS} {format_public_key(key, f'worker-{n}')}\n" for n, key in others)
