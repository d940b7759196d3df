"""Secrets of a cloud on several machines, looked for where none may be: what Ray keeps, logs, environments, packets."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

from isthmus.common.errors import IsthmusError
from isthmus.experiments.harness.processes import TaskProcess
from isthmus.experiments.network.net_space import within
from isthmus.experiments.rigs.cluster import canary_edge
from isthmus.experiments.rigs.cluster.cases import FIRST, SECOND, World, processes_of
from isthmus.experiments.rigs.cluster.net_machines import Machine
from isthmus.experiments.rigs.cluster.packets import Packets
from isthmus.experiments.rigs.cluster.ray_nodes import SESSIONS
from isthmus.experiments.rigs.secrets.memory_scan import WINDOW, Scanner, canaries_of
from isthmus.protocol.secure.keys import Fingerprint

STORE, FILES, ENVIRONMENTS, NETWORK = "control store", "logs and other files", "environments", "network"
WATCHED: Final = "secrets"
"""The name of the case in which they are looked for."""
PLACES: Final = (STORE, FILES, ENVIRONMENTS, NETWORK)
CONTROL: Final = "control"
_KEY_FILES: Final = ("issuer_key", "worker_key", "node_key", "edge.key", "ray_tls_key.pem", "ray_ca_key.pem", "token")
SETTLE_SECONDS = 1.0
"""For packets under way."""


@dataclass(frozen=True, slots=True)
class Looked:
    """What was found where.

    Attributes:
        found: kinds of secrets, by place; empty where all is well.
        controls: whether what must be found was, by place.
        canaries: how many were looked for, of `kinds` kinds.
        scanned: bytes, by place.
    """

    found: dict[str, dict[str, int]]
    controls: dict[str, bool]
    canaries: int
    kinds: list[str]
    scanned: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "found": self.found,
            "controls": self.controls,
            "canaries": self.canaries,
            "kinds": self.kinds,
            "scanned": self.scanned,
        }


def send_control(sender: Machine, receiver: Machine) -> bytes:
    """Send some random bytes from a machine to another as they are; returns them."""
    content = os.urandom(WINDOW)
    with within(sender.namespace), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:
        plain.sendto(content, (receiver.address, 9))  # the discard service
    return content


def look_for(world: World, sent: Mapping[str, str], packets: Packets, control: bytes) -> Looked:
    """Look for the secrets of a world whose cloud serves, or has served until now.

    Args:
        world: with its machines on.
        sent: what an edge has sent and got, and its session keys: kinds by hex, of `canary_edge`.
        packets: all that has crossed; they have ended.
        control: what `send_control` has sent.
    """
    canaries = {bytes.fromhex(each): kind for each, kind in sent.items()} | secrets_of(world)
    root = json.loads((world.cloud.home / "issuer_cert").read_text())["root"]
    session = (world.cloud.ray.head.folder / SESSIONS / "session_latest").readlink().name
    digest = Fingerprint.of(base64.b64decode(root)).digest
    controls = {
        STORE: digest[:WINDOW],
        FILES: session.encode()[-WINDOW:],
        ENVIRONMENTS: str(world.cloud.owner.folder / "ray" / "token").encode()[-WINDOW:],
        NETWORK: control,
    }
    found, seen, scanned = {}, {}, {}
    for where in PLACES:
        scanner = Scanner({**canaries, controls[where]: CONTROL})
        counted: Counter[str] = scanner.count(_parts(where, world, packets))
        seen[where] = bool(counted.pop(CONTROL, 0))
        scanned[where] = scanner.scanned
        if counted:
            found[where] = dict(counted)
    return Looked(found, seen, len(canaries), sorted(set(canaries.values())), scanned)


def secrets_of(world: World) -> dict[bytes, str]:
    """Private keys and tokens on all machines' disks: as they are, in hex, and in the text of their files."""
    canaries: dict[bytes, str] = {}
    for path in _key_files(world):
        text = path.read_bytes()
        body = b"".join(line for line in text.splitlines() if not line.startswith(b"-----"))
        # The beginning of a file is alike in all files of its format.
        canaries |= dict.fromkeys(canaries_of(body[len(body) // 3 :], 4), path.name)
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            load = load_ssh_private_key if b"OPENSSH" in text else load_pem_private_key
            seed = load(text, password=None).private_bytes_raw()  # type: ignore[union-attr]
            canaries |= {seed[:WINDOW]: path.name, seed.hex().encode()[:WINDOW]: path.name}
    kinds = set(canaries.values())
    if missing := [name for name in _KEY_FILES if name not in kinds]:
        raise IsthmusError(f"no machine has the file {missing[0]}: what is to be looked for has another name")
    return canaries


def _key_files(world: World) -> list[Path]:
    return [path for path in sorted(world.machines.root.rglob("*")) if path.name in _KEY_FILES and path.is_file()]


def _parts(where: str, world: World, packets: Packets) -> Iterator[bytes]:
    store = world.cloud.ray.environment(world.cloud.ray.head)["RAY_gcs_storage_path"]
    if where == NETWORK:
        yield from packets.parts()
    elif where == ENVIRONMENTS:
        for machine in world.machines.all.values():
            for process in processes_of(machine):
                with contextlib.suppress(OSError):
                    yield Path(f"/proc/{process.pid}/environ").read_bytes()
    else:
        keys = set(_key_files(world))
        for path in sorted(world.machines.root.rglob("*")):
            if path in keys or not path.is_file() or path.is_symlink() or path == packets.path:
                continue
            if (Path(store) in path.parents) == (where == STORE):
                with contextlib.suppress(OSError):
                    yield path.read_bytes()


def secrets_kept(world: World) -> dict[str, Any]:
    """Have an edge send what can be looked for, through a pipeline over two machines, and look for it.

    Returns:
        `Looked`, as JSON, and `packets` with `packets_dropped`.
    """
    cloud = world.cloud
    with cloud.serving("--pipeline", "2"):
        task = {"cloud": cloud.connection, "key": str(world.key)}
        with within(cloud.owner.namespace), TaskProcess("the edge", canary_edge.__name__, task) as edge:
            sent = edge.answer()
        control = send_control(*(world.machines.all[name] for name in (FIRST, SECOND)))
        time.sleep(SETTLE_SECONDS)
        packets = world.end_packets()
        looked = look_for(world, sent, packets, control)
    return {**looked.as_dict(), "packets": packets.count, "packets_dropped": packets.dropped}
