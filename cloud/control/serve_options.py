"""The options of `isthmus cloud serve`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from isthmus.cloud.bounds import Bounds


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of an outer TLS layer.

    Attributes:
        cert: the certificate chain.
        key: its private key.
        client_ca: the CA that edges' certificates must come from; None where they show none.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """The options of `isthmus cloud serve` that are for a Ray cluster alone.

    Attributes:
        address: of the cluster.
        name: of the cloud, by which other commands find it.
        detach: whether to return once it serves.
        worker_memory: bytes that each worker claims of its node; 0 claims none.
        labels: labels that a worker's node must have, in the order of preference.
        certificate_hours: until a worker's certificate expires.
        autoscaled: whether the cluster may have no node that takes workers yet.
        model_port: of this machine, where workers fetch the model; 0 for a free one.
    """

    address: str
    name: str = "cloud"
    detach: bool = False
    worker_memory: int = 0
    labels: tuple[dict[str, str], ...] = ()
    certificate_hours: float = 24.0
    autoscaled: bool = False
    model_port: int = 0


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The options of `isthmus cloud serve`, whose `--help` describes them.

    `emulators` are FOLDER or NAME=FOLDER, of which `check_packages` makes the latter.
    `edge_layers`, `dtype` and `quantize` are None where they were not given, as a saved span has its own.
    """

    model: str
    home: Path
    edge_layers: str | None = None
    listen: str = "127.0.0.1:7443"
    advertise: str | None = None
    metrics: str = ""
    dtype: str | None = None
    quantize: str | None = None
    stash_bytes: int | None = None
    compute_bytes: int | None = None
    max_tokens: int = 1 << 13
    threads: int | None = None
    workers: str = "1"
    pipeline: int = 1
    cluster: ClusterOptions | None = None
    grace: float = 30.0
    connection_file: Path | None = None
    emulators: tuple[str, ...] = ()
    sites: bool = True
    device: str = "cpu"
    record: Path | None = None
    record_mib: int = 1024
    wipe_freed: bool = False
    tls: TlsFiles | None = None
    bounds: Bounds = field(default_factory=Bounds)
