"""Certificates for workers on the nodes that the owner has enrolled, by the issuer's key in the owner's folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from isthmus.common.errors import ConfigError, KeyFileError, NotEnrolledError
from isthmus.protocol.enrolment import EDGES_FILE, REVOKED_FILE, AuthorizedEdges
from isthmus.protocol.secure.certificates import CertificateRequest, WorkerCertificate
from isthmus.protocol.secure.keyfiles import read_text
from isthmus.protocol.secure.keys import Fingerprint, Issuer, load_issuer

NODES_FILE = "authorized_nodes"
"""The nodes whose workers are certified, one line each, as in `authorized_edges`."""
HOUR = 3600
SETTLED_SECONDS = 1.0
"""Between two readings of a list that is shorter than before, to tell that nobody is still writing it."""


class IssuingOffice:
    """Signs requests of workers. The issuer's files and the list of nodes are read anew for each.

    Args:
        home: the owner's folder.
        hours: until a worker's certificate expires.
        now: Unix seconds.

    Attributes:
        fault: what is wrong with the list of nodes; "" where nothing is.
    """

    def __init__(self, home: Path, hours: float, now: Callable[[], float] = time.time) -> None:
        self._home, self._hours, self._now = home, hours, now
        self._nodes: AuthorizedEdges | None = None
        self._shorter: tuple[AuthorizedEdges, float] | None = None  # a list without some of these, and when it was read
        self.fault = ""

    def grant(self, request: CertificateRequest) -> WorkerCertificate:
        """A certificate for the key that a request is for.

        Raises:
            KeyFileError: the issuer's key or certificate cannot be used: it has expired, say.
            NotEnrolledError: the node's key is not enrolled, or has not signed this.
            IsthmusError: it has not signed it lately.
        """
        issuer = load_issuer(self._home, self._now)
        self.check(request, issuer.pin.digest)
        return issuer.issue(request.worker, self._now() + self._hours * HOUR)

    def check(self, request: CertificateRequest, cloud: bytes) -> None:
        """Check that an enrolled node has signed a request to a cloud, lately. Raises what `grant` raises."""
        nodes = self.nodes()
        if nodes is None:
            raise KeyFileError(self.fault)
        if nodes.find(request.node) is None:
            raise NotEnrolledError(
                f"the node's key {Fingerprint.of(request.node)} is not enrolled: run `isthmus cloud enroll-node` with "
                "its node_key.pub"
            )
        request.verify(cloud, self._now())

    def nodes(self) -> AuthorizedEdges | None:
        """The nodes that are enrolled now: the last good list where the file is malformed; None where there was none.

        A list that some nodes are missing from counts once it has been read again a second later: an editor that is
        writing the file leaves it short, or away, for a moment. Sets `fault`.
        """
        try:
            read, self.fault = enrolled_nodes(self._home), ""
        except (ConfigError, KeyFileError) as error:
            self.fault = str(error)
            return self._nodes
        if self._nodes is None or read.has_all_of(self._nodes):
            self._nodes, self._shorter = read, None
        elif self._shorter is None or self._shorter[0] != read:
            self._shorter = read, self._now()
        elif abs(self._now() - self._shorter[1]) >= SETTLED_SECONDS:
            self._nodes, self._shorter = read, None
        return self._nodes

    def issuer(self) -> Issuer:
        """The issuer's key and certificate. Raises KeyFileError."""
        return load_issuer(self._home, self._now)


def enrolled_nodes(home: Path) -> AuthorizedEdges:
    """The enrolled nodes, by their raw public keys; none where there is no file.

    Raises:
        ConfigError: the file is malformed.
        KeyFileError: it cannot be read, or another user may write it.
    """
    path = home / NODES_FILE
    return AuthorizedEdges.load(path) if path.exists() else AuthorizedEdges.parse("")


class TenantsText:
    """The text of the owner's `authorized_edges`, or of `revoked_edges`, whose last good text stays where it is gone.

    Attributes:
        fault: what is wrong with the file; "" where nothing is.
    """

    def __init__(self, home: Path, name: str = EDGES_FILE) -> None:
        self._path = home / name
        self._good: str | None = None
        self.fault = ""

    def __call__(self) -> str | None:
        """The text now: the last good one where the file is malformed; None where there was none. Sets `fault`."""
        try:
            text = read_text(self._path, "run `isthmus cloud enroll`", ours=True) if self._path.exists() else ""
            if not text and self._good is not None and self._path.name == REVOKED_FILE:
                text = self._good
            if text != self._good:
                AuthorizedEdges.parse(text, str(self._path))
            self._good, self.fault = text, ""
        except (ConfigError, KeyFileError) as error:
            self.fault = str(error)
        return self._good
