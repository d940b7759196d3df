"""Ray's processes of one machine: `ray start`, as an operator runs it."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from isthmus.cloud.cluster.cluster_spec import RESOURCE
from isthmus.cloud.cluster.ray_tls import CA_KEY, issue_node, make_ca
from isthmus.common.errors import UnreachableError
from isthmus.experiments.rigs.cluster.net_machines import HERE, Machine

PORT = 6379
SESSIONS = "r"
"""The folder of a machine in which Ray has its sockets and logs."""
START_SECONDS = 90.0
DAYS = 60
OBJECT_STORE = 80 << 20
"""Bytes, the least that Ray takes: nothing of a cloud is in it."""
FAST_SETTINGS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""Of the head: a node that died is noticed after a second and a half, and by default after ten."""
KEPT = ("PATH", "LANG", "PYTHONPATH", "VIRTUAL_ENV")
OWN_FOLDERS = {"HOME": "user", "TMPDIR": "tmp"}
"""Of a machine: variables that would name a folder of all machines, and the folder inside its own."""


@dataclass(frozen=True, slots=True)
class RayCluster:
    """What the nodes of a cluster have in common.

    Attributes:
        head: the machine with the control store.
        storage: whether the control store keeps what it knows on the head's disk.
        settings: variables of all nodes, beside TLS and token.
        token: Ray's.
    """

    head: Machine
    storage: bool = False
    settings: Mapping[str, str] = field(default_factory=lambda: dict(FAST_SETTINGS))
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    _variables: dict[str, dict[str, str]] = field(default_factory=dict, init=False)

    @property
    def address(self) -> str:
        """Of the control store."""
        return f"{self.head.address}:{PORT}"

    def environment(self, machine: Machine) -> dict[str, str]:
        """The variables of a machine's programs. Its files are made where they are not there yet."""
        ray = machine.folder / "ray"
        if not ray.exists():
            ray.mkdir(mode=0o700)
            token = ray / "token"
            token.touch(mode=0o600)
            token.write_text(self.token)
        tls = self._tls(machine, ray)
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        own = {name: machine.folder / folder for name, folder in OWN_FOLDERS.items()}
        for folder in own.values():
            folder.mkdir(mode=0o700, exist_ok=True)
        storage = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(ray / "control-store")}
        return {
            **kept,
            **{name: str(folder) for name, folder in own.items()},
            **tls,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(ray / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "ISTHMUS_NODE_HOME": str(machine.folder / "node"),
            "ISTHMUS_CACHE": str(machine.folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            **(storage if self.storage and machine is self.head else {}),
            **self.settings,
        }

    def _tls(self, machine: Machine, folder: Path) -> dict[str, str]:
        """Ray's variables for TLS; certificates are made by a CA on the head's disk."""
        ca = self.head.folder / "ca"
        if not (ca / CA_KEY).exists():
            make_ca(ca, DAYS)
        if machine.name not in self._variables:
            self._variables[machine.name] = issue_node(ca, [machine.address], folder, DAYS)
        return self._variables[machine.name]

    def start(
        self,
        machine: Machine,
        workers: int = 0,
        *,
        options: Sequence[str] = (),
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Start a machine's node, which takes so many workers, and wait until it has joined.

        Args:
            machine: which.
            workers: that it takes.
            options: further ones of `ray start`.
            settings: further variables of its processes.

        Raises:
            UnreachableError: it has not.
        """
        ray = str(Path(sys.executable).parent / "ray")
        is_head = machine is self.head
        place = ["--head", f"--port={PORT}", "--include-dashboard=false"] if is_head else [f"--address={self.address}"]
        resources = f'{{"{RESOURCE}": {workers}}}' if workers else "{}"
        command = [
            ray,
            "start",
            "--block",
            f"--node-ip-address={machine.address}",
            f"--object-store-memory={OBJECT_STORE}",
            "--memory=4000000000",
            "--num-cpus=0",
            f"--resources={resources}",
            "--include-log-monitor=false",
            *place,
        ]
        command.append(f"--temp-dir={HERE / SESSIONS}")  # paths of sockets have to be short
        log = machine.folder / "ray.log"
        log.write_bytes(b"")
        process = machine.start([*command, *options], {**self.environment(machine), **(settings or {})}, log)
        deadline = time.monotonic() + START_SECONDS
        while b"Ray runtime started" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace").strip().splitlines()
                raise UnreachableError(
                    f"Ray did not start on {machine.name}: {said[-1] if said else 'it says nothing'}"
                )
            time.sleep(0.05)
