"""Secrets of a cloud on several machines, looked for where none may be: what Ray keeps, logs, environments, packets."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

from isthmus.common.errors import IsthmusError
from isthmus.experiments.harness.processes import TaskProcess
from isthmus.experiments.network.net_space import within
from isthmus.experiments.rigs.cluster import canary_edge
from isthmus.experiments.rigs.cluster.cluster_world import Shape, World
from isthmus.experiments.rigs.cluster.machine_processes import processes_of
from isthmus.experiments.rigs.cluster.packets import Packets
from isthmus.experiments.rigs.cluster.ray_nodes import SESSIONS
from isthmus.experiments.rigs.secrets.memory_scan import WINDOW, Scanner
from isthmus.protocol.secure.keys import Fingerprint

STORE, FILES, ENVIRONMENTS, NETWORK = "control store", "logs and other files", "environments", "network"
SECRETS: Final = "secrets"
"""The name of the case in which they are looked for."""
SHAPE: Final = Shape(storage=True, captured=True)
"""Of its world."""
PLACES: Final = (STORE, FILES, ENVIRONMENTS, NETWORK)
CONTROL: Final = "control"
_KEY_FILES: Final = ("issuer_key", "worker_key", "node_key", "edge.key", "ray_tls_key.pem", "ray_ca_key.pem", "token")
SETTLE_SECONDS = 1.0
"""For packets under way."""


def look_for(world: World, sent: Mapping[str, str], packets: Packets, control: bytes) -> dict[str, Any]:
    """Look for the secrets of a world whose cloud serves.

    Args:
        world: with its machines on.
        sent: what an edge has sent and got, and its session keys: kinds by hex, of `canary_edge`.
        packets: all that has crossed; they have ended.
        control: what has crossed as it is.

    Raises:
        IsthmusError: a key or a token is not where it is expected, or not in a known format.

    Returns:
        `found`, kinds of secrets by place, empty where all is well; `found_in`, the files, processes and packets with
        them; `controls`, by place whether what must be found was; `canaries`, how many were looked for, of `kinds`;
        `scanned`, bytes by place; `packets`, `packets_dropped`.
    """
    canaries = {bytes.fromhex(each): kind for each, kind in sent.items()} | secrets_of(_key_files(world))
    if missing := set(_KEY_FILES) - set(canaries.values()):
        raise IsthmusError(f"no machine has the file {missing.pop()}: what is to be looked for has another name")
    root = json.loads((world.cloud.home / "issuer_cert").read_text())["root"]
    session = (world.ray.head.folder / SESSIONS / "session_latest").readlink().name
    planted = {
        STORE: Fingerprint.of(base64.b64decode(root)).digest[:WINDOW],
        FILES: session.encode()[-WINDOW:],
        ENVIRONMENTS: str(world.cloud.owner.folder / "ray" / "token").encode()[-WINDOW:],
        NETWORK: control,
    }
    found, controls, scanned = {}, {}, {}
    found_in: set[str] = set()
    for where in PLACES:
        scanner = Scanner({**canaries, planted[where]: CONTROL})
        counted: Counter[str] = Counter()
        for name, part in _parts(where, world, packets):
            here = scanner.count([part])
            counted += here
            found_in |= {name} if here.keys() - {CONTROL} else set()
        controls[where] = bool(counted.pop(CONTROL, 0))
        scanned[where] = scanner.scanned
        if counted:
            found[where] = dict(counted)
    return {
        "found": found,
        "found_in": sorted(found_in),
        "controls": controls,
        "canaries": len(canaries),
        "kinds": sorted(set(canaries.values())),
        "scanned": scanned,
        "packets": packets.count,
        "packets_dropped": packets.dropped,
    }


def nothing_secret(looked: Mapping[str, Any]) -> bool:
    """Whether nothing was found where none may be, every control was, and the capture has missed no packet."""
    return not looked["found"] and all(looked["controls"].values()) and not looked["packets_dropped"]


def secrets_of(paths: Iterable[Path]) -> dict[bytes, str]:
    """What to look for of files with a private key or a token: kinds by window, the kind being the file's name.

    Raises:
        IsthmusError: a file has none of the forms that its secret is looked for in, so that a copy would not be found.
    """
    canaries: dict[bytes, str] = {}
    for path in paths:
        text = path.read_bytes()
        own = dict.fromkeys(_forms_of(_secret_of(text)), path.name)
        if not Scanner(own).count([text]):
            raise IsthmusError(f"{path} would not be found if it were somewhere else: its format has changed")
        canaries |= own
    return canaries


def _secret_of(text: bytes) -> bytes:
    """The secret number in a private key's file, without the public key that is in there too; a token as it is."""
    if not text.startswith(b"-----"):
        return text.strip()
    load = load_ssh_private_key if b"OPENSSH" in text else load_pem_private_key
    key = load(text, password=None)
    if isinstance(key, EllipticCurvePrivateKey):
        return key.private_numbers().private_value.to_bytes(key.key_size // 8, "big")
    return key.private_bytes_raw()  # type: ignore[union-attr]  # all others are Ed25519


def _forms_of(secret: bytes) -> Iterator[bytes]:
    """Windows of a secret as it is, in hex, and in base64, wherever it begins in a group of three bytes.

    Two of each: a line of base64 may end inside one of them.
    """
    forms = [secret, secret.hex().encode()]
    for before in range(3):
        text = base64.b64encode(bytes(before) + secret)
        forms.append(text[4 if before else 0 : -4])  # what has bits of what lies before, or behind
    for form in forms:
        yield form[:WINDOW]
        yield form[-WINDOW:]


def _key_files(world: World) -> list[Path]:
    return [path for path in sorted(world.machines.root.rglob("*")) if path.name in _KEY_FILES and path.is_file()]


def _parts(where: str, world: World, packets: Packets) -> Iterator[tuple[str, bytes]]:
    """What there is in a place to look through, each with a name that tells a reader where it is."""
    root, store = world.machines.root, world.ray.environment(world.ray.head)["RAY_gcs_storage_path"]
    if where == NETWORK:
        yield from (("packets", part) for part in packets.parts())
    elif where == ENVIRONMENTS:
        for machine in world.machines.all.values():
            for process in processes_of(machine):
                with contextlib.suppress(OSError):
                    yield f"process {process.pid}", Path(f"/proc/{process.pid}/environ").read_bytes()
    else:
        keys = set(_key_files(world))
        for path in sorted(root.rglob("*")):
            if path in keys or not path.is_file() or path.is_symlink() or path == packets.path:
                continue
            if (Path(store) in path.parents) == (where == STORE):
                with contextlib.suppress(OSError):
                    yield str(path.relative_to(root)), path.read_bytes()


def secrets_kept(world: World) -> dict[str, Any]:
    """Have an edge send what can be looked for, through a pipeline over two machines, and look for it.

    Returns:
        What `look_for` returns.

    Raises:
        IsthmusError: the world's packets are not written down, or the control was lost.
    """
    cloud, packets, (first, second) = world.cloud, world.packets, world.takers
    if packets is None:
        raise IsthmusError("nobody writes down what crosses the network")
    with cloud.serving("--pipeline", "2"):
        task = {"cloud": cloud.connection, "key": str(world.keys[0])}
        with within(cloud.owner.namespace), TaskProcess("the edge", canary_edge.__name__, task) as edge:
            sent = edge.answer()
        control = os.urandom(WINDOW)
        if not world.machines.delivered(first, second, [control]):
            raise IsthmusError("the control did not cross the network")
        time.sleep(SETTLE_SECONDS)
        packets.end()
        return look_for(world, sent, packets, control)
