"""Secrets of a cloud on several machines, looked for where none may be: what Ray keeps, logs, environments, packets.

They are looked for as they are, and in the forms that text would have them in: see `text_forms`. In each place two
sorts of controls must be found: something that the cloud or Ray has put there by itself, and something planted in each
form.
"""

from __future__ import annotations

import base64
import contextlib
import json
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

from isthmus.common.errors import IsthmusError
from isthmus.experiments.harness.processes import TaskProcess
from isthmus.experiments.network.net_space import within
from isthmus.experiments.rigs.cluster import canary_edge, store_note
from isthmus.experiments.rigs.cluster.cluster_world import Shape, World
from isthmus.experiments.rigs.cluster.machine_processes import processes_of
from isthmus.experiments.rigs.cluster.packets import Packets
from isthmus.experiments.rigs.cluster.ray_nodes import SESSIONS
from isthmus.experiments.rigs.secrets.memory_scan import WINDOW
from isthmus.experiments.rigs.secrets.text_controls import Planted
from isthmus.experiments.rigs.secrets.text_forms import PIECE, Numbers, TextScanner
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


@dataclass(frozen=True, slots=True)
class Sent:
    """What an edge has sent and got, and its session keys.

    Attributes:
        canaries: Kinds by bytes.
        runs: Kinds by values that are next to each other.
    """

    canaries: Mapping[bytes, str]
    runs: Mapping[Numbers, str]

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Sent:
        """What `canary_edge` says."""
        return cls(
            {bytes.fromhex(each): kind for each, kind in said["canaries"].items()},
            {tuple(run): kind for run, kind in said["runs"]},
        )


def look_for(world: World, sent: Sent, packets: Packets, planted: Mapping[str, Planted]) -> dict[str, Any]:
    """Look for the secrets of a world whose cloud serves.

    Args:
        world: with its machines on.
        sent: what an edge has sent.
        packets: all that has crossed; they have ended.
        planted: the controls of each place, which are there.

    Raises:
        IsthmusError: a key or a token is not where it is expected, or not in a known format.

    Returns:
        `found`, kinds of secrets by place, empty where all is well; `found_in`, the files, processes and packets with
        them; `controls`, by place whether all that must be found was; `forms`, by place how often the control in each
        form was; `canaries`, how many were looked for, of `kinds`; `scanned`, bytes by place; `packets`,
        `packets_dropped`.
    """
    canaries = {**sent.canaries, **secrets_of(_key_files(world))}
    if missing := set(_KEY_FILES) - set(canaries.values()):
        raise IsthmusError(f"no machine has the file {missing.pop()}: what is to be looked for has another name")
    root = json.loads((world.cloud.home / "issuer_cert").read_text())["root"]
    session = (world.ray.head.folder / SESSIONS / "session_latest").readlink().name
    there_already = {
        STORE: Fingerprint.of(base64.b64decode(root)).digest[:WINDOW],
        FILES: session.encode()[-WINDOW:],
        ENVIRONMENTS: str(world.cloud.owner.folder / "ray" / "token").encode()[-WINDOW:],
    }
    found, controls, forms, scanned = {}, {}, {}, {}
    found_in: set[str] = set()
    for where in PLACES:
        own = {there_already[where]: CONTROL} if where in there_already else {}
        control_kinds = {CONTROL, *planted[where].kinds}
        scanner = TextScanner({**canaries, **own, **planted[where].canaries}, {**sent.runs, **planted[where].runs})
        counted: Counter[str] = Counter()
        for name, part in _parts(where, world, packets):
            here = scanner.count([part])
            counted += here
            found_in |= {name} if here.keys() - control_kinds else set()
        forms[where] = planted[where].found(counted)
        controls[where] = all(forms[where].values()) and (not own or counted[CONTROL] > 0)
        scanned[where] = scanner.scanned
        if secret := {kind: count for kind, count in counted.items() if kind not in control_kinds}:
            found[where] = secret
    return {
        "found": found,
        "found_in": sorted(found_in),
        "controls": controls,
        "forms": forms,
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
    """What to look for of files with a private key or a token, kinds by bytes, the kind being the file's name.

    It is the beginning and the end of the secret: a line of base64 may end inside one of them.

    Raises:
        IsthmusError: a file has none of the forms that its secret is looked for in, so that a copy would not be found.
    """
    canaries: dict[bytes, str] = {}
    for path in paths:
        text = path.read_bytes()
        secret = _secret_of(text)
        own = dict.fromkeys((secret[:PIECE], secret[-PIECE:]), path.name)
        if not TextScanner(own).count([text]):
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
    planted = {where: Planted(where, as_it_is=where != ENVIRONMENTS) for where in PLACES}
    with cloud.serving("--pipeline", "2"):
        task = {"cloud": cloud.connection, "key": str(world.keys[0])}
        with within(cloud.owner.namespace), TaskProcess("the edge", canary_edge.__name__, task) as edge:
            sent = Sent.of(edge.answer())
        control = planted[NETWORK].pieces
        if world.machines.delivered(first, second, control) < len(control):
            raise IsthmusError("the control did not cross the network")
        with _planted(world, planted):
            time.sleep(SETTLE_SECONDS)
            packets.end()
            return look_for(world, sent, packets, planted)


@contextlib.contextmanager
def _planted(world: World, planted: Mapping[str, Planted]) -> Iterator[None]:
    """Controls in the control store, beside and in a copy of a log, and in the environment of a process."""
    owner, head = world.cloud.owner, world.ray.head
    environment = world.ray.environment(owner)
    task = {"address": world.ray.address, "value": planted[STORE].lines.hex()}
    with (
        within(owner.namespace),
        TaskProcess("the control store's control", store_note.__name__, task, environment=environment) as note,
    ):
        note.answer()
    log = (head.folder / "ray.log").read_bytes()
    (head.folder / "controls.log").write_bytes(log + planted[FILES].log_lines + log)
    texts = "\n".join(planted[ENVIRONMENTS].texts.values())
    process = owner.start(["sleep", "infinity"], {**environment, "BENCH_CONTROL": texts}, owner.folder / "sleep.txt")
    try:
        yield
    finally:
        owner.signal(process, signal.SIGTERM)  # it is no process of the cloud's, which are counted later
        process.wait()
