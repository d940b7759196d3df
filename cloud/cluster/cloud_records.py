"""What is kept of a cloud beside its actors: a note in Ray's control store, `serving.json` in its owner's folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from isthmus.cloud.cluster.cluster_spec import ClusterSpec
from isthmus.cloud.cluster.joined_cluster import JoinedCluster
from isthmus.cloud.cluster.planned_cluster import check_place, connection_of
from isthmus.cloud.control.serve_options import ServeOptions
from isthmus.cloud.control.serve_state import clear_state, write_state
from isthmus.common.files import write_atomic
from isthmus.protocol.secure.keys import Fingerprint, load_issuer


@dataclass(frozen=True, slots=True)
class CloudNote:
    """What the control store keeps of a cloud, for commands that its controller does not answer. Nothing is secret.

    A control store that was lost, and came back with nothing in it, has no note either: such a cloud was not stopped.

    Attributes:
        home: the owner's folder on the controller's node; "" where nobody has said.
        pin: fingerprint of the cloud's root key.
        autoscaled: whether nodes are added by themselves.
        stopped: whether `isthmus cloud stop` has ended the cloud.
    """

    home: str = ""
    pin: str = ""
    autoscaled: bool = False
    stopped: bool = False


def read_note(cluster: JoinedCluster, cloud: str) -> CloudNote | None:
    """The note of a cloud by its name; None where there is none. Raises UnreachableError."""
    try:
        return CloudNote(**json.loads(cluster.kept(_note_name(cloud)) or b""))
    except (ValueError, TypeError):  # none, or one of another version
        return None


def write_note(cluster: JoinedCluster, cloud: str, note: CloudNote) -> None:
    """Keep a note of a cloud, in the place of an older one. Raises UnreachableError."""
    cluster.keep(_note_name(cloud), json.dumps(dataclasses.asdict(note)).encode())


def _note_name(cloud: str) -> str:
    return f"isthmus-{cloud}-note"


def machines_of(places: Iterable[str]) -> set[str]:
    """The hosts of places, `host:port` each, without brackets."""
    return {place.rpartition(":")[0].strip("[]") for place in places}


def write_serving(spec: ClusterSpec, places: Iterable[str], connection_file: Path | None = None) -> str:
    """Write where a cloud serves into its owner's folder, which has to be on this machine.

    Args:
        spec: the cloud's.
        places: addresses of the workers that serve, one at least.
        connection_file: where the connection string is written besides; None for nowhere.

    Returns:
        The connection string.

    Raises:
        KeyFileError: the folder is not here, or cannot be used.
        DiskError: it cannot be written.
    """
    home = Path(spec.home)
    check_place(spec)
    issuer = load_issuer(home)
    addresses = ServeOptions("", home, listen=spec.worker.worker.listen, advertise=spec.worker.advertise or None)
    connection = str(connection_of(addresses, spec, issuer, places))
    write_state(home, {"connection": connection, "metrics": spec.metrics, "pid": os.getpid()})
    if connection_file is not None:
        write_atomic(connection_file, f"{connection}\n".encode())
    return connection


def clear_serving(note: CloudNote) -> None:
    """Remove what says where a cloud serves, if it is on this machine."""
    if note.home:
        with contextlib.suppress(PermissionError):  # another user's folder
            clear_state(Path(note.home), note.pin)


def note_of(spec: ClusterSpec, *, autoscaled: bool) -> CloudNote:
    """The note of a cloud that is being started."""
    return CloudNote(spec.home, str(Fingerprint(spec.worker.root)), autoscaled)
