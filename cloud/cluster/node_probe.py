"""What `isthmus cloud doctor` looks up on each node, as a task there."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

from isthmus.cloud.cluster.ray_tls import uses_tls
from isthmus.cloud.control.ports import listeners_of
from isthmus.cloud.nodes.worker_home import node_home
from isthmus.common.errors import IsthmusError
from isthmus.protocol.secure.keys import load_node

PACKAGES = ("isthmus", "ray", "torch", "transformers")
"""Whose versions have to be the same: other ones may compute other bits, or not understand each other."""
_RAY = ("raylet", "gcs_server", "ray::", "ray.dashboard", "/ray/")


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What is so on a node.

    Attributes:
        versions: of Python and `PACKAGES`.
        node_key: the node's raw public key; empty where it has none that can be used.
        key_fault: why not.
        tls: whether Ray uses TLS there, as its environment says.
        token: whether Ray asks for a token there.
        tls_until: when Ray's TLS certificate there expires, in Unix seconds; None without one.
        open_ports: ports of Ray and of workers that other machines can reach: "process port".
        digest: of the model on the path that was asked about; "" where there is none.
    """

    versions: dict[str, str]
    node_key: bytes
    key_fault: str
    tls: bool
    token: bool
    tls_until: float | None
    open_ports: tuple[str, ...]
    digest: str


def probe(model: str) -> NodeFacts:
    """Look up what is so on this node; `model` is a path that may have the model, or ""."""
    key, fault = b"", ""
    try:
        key = load_node(node_home()).public_key().public_bytes_raw()
    except IsthmusError as error:
        fault = str(error)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return NodeFacts(
        {"python": platform.python_version(), **versions},
        key,
        fault,
        uses_tls(),
        os.environ.get("RAY_AUTH_MODE", "").lower() == "token",
        _tls_until(),
        _open_ports(),
        _digest(model),
    )


def clock() -> float:
    """This node's time, in Unix seconds."""
    return time.time()


def _tls_until() -> float | None:
    from cryptography import x509

    path = os.environ.get("RAY_TLS_SERVER_CERT", "")
    if not uses_tls() or not path:
        return None
    try:
        return x509.load_pem_x509_certificate(Path(path).read_bytes()).not_valid_after_utc.timestamp()
    except (OSError, ValueError):
        return None


def _open_ports() -> tuple[str, ...]:
    import psutil

    def rays() -> list[psutil.Process]:
        return [each for each in psutil.process_iter(["name", "cmdline"]) if _is_rays(each.info)]

    found = {f"{each.process} {each.port}" for each in listeners_of(rays(), lambda process: None) if not each.private}
    return tuple(sorted(found))


def _is_rays(info: dict[str, object]) -> bool:
    words = info.get("cmdline")
    text = f"{info.get('name')} {' '.join(words) if isinstance(words, list) else ''}"
    return any(name in text for name in _RAY)


def _digest(model: str) -> str:
    from isthmus.backbone.checkpoints.sources import Checkpoint

    if not model or not (Path(model) / "config.json").is_file():
        return ""
    try:
        return Checkpoint(Path(model), "").digest()
    except IsthmusError as error:
        return f"unreadable ({error})"
