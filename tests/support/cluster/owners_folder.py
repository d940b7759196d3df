"""The folder of a cloud's owner on a cluster, and the nodes that are enrolled there."""

from __future__ import annotations

import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.cloud.cluster.issuing import NODES_FILE
from isthmus.protocol.enrolment import add_line
from isthmus.protocol.secure.keys import Fingerprint, generate_edge, generate_root, load_node, make_issuer


class OwnersFolder:
    """A root key, an issuer that it has certified, and no node yet.

    Args:
        folder: where `owner` is made, the owner's folder, and a folder for each node.
        now: Unix seconds from which on the issuer has its days.
    """

    def __init__(self, folder: Path, days: float = 7, now: float | None = None) -> None:
        self.folder = folder / "owner"
        self.pin: Fingerprint = generate_root(self.folder)
        make_issuer(self.folder, days, time.time if now is None else lambda: now)

    def new_node(self, name: str = "gpu-1", *, enrolled: bool = True) -> Path:
        """Make a node's folder with its key, and enrol it."""
        home = self.folder.parent / name
        line = generate_edge(home / "node_key", name)
        if enrolled:
            add_line(self.folder / NODES_FILE, line, name)
        return home

    def node_key(self, name: str = "gpu-1", *, enrolled: bool = True) -> Ed25519PrivateKey:
        """Make a node, and give its key."""
        return load_node(self.new_node(name, enrolled=enrolled))
