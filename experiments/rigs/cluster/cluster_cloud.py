"""A cloud on several machines, and the commands of its owner, on a machine of its own that takes no workers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isthmus.cloud.cluster.issuing import NODES_FILE
from isthmus.common.errors import IsthmusError, UnreachableError
from isthmus.experiments.harness.processes import isthmus
from isthmus.experiments.rigs.cluster.net_machines import Machine, Machines
from isthmus.experiments.rigs.cluster.ray_nodes import RayCluster
from isthmus.protocol.enrolment import add_line
from isthmus.protocol.secure.keys import NODE_KEY, generate_edge, generate_root, make_issuer

SERVE_SECONDS = 180.0
PORT = 7443
COMMAND_SECONDS = 120.0


@dataclass(slots=True)
class ClusterCloud:
    """A cloud whose owner's folder is on one machine, with workers on others.

    Attributes:
        machines: all of them.
        owner: where `serve` runs; a node that takes no workers.
        ray: the cluster.
        model: folder of the model, as the owner names it.
        layers: the split plan.
        threads: of each worker.
        connection: the connection string, once it serves.
    """

    machines: Machines
    owner: Machine
    ray: RayCluster
    model: Path
    layers: str = "2:2"
    threads: int = 1
    connection: str = ""
    _serve: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def home(self) -> Path:
        """The owner's folder."""
        return self.owner.folder / "cloud"

    @property
    def log(self) -> Path:
        """What `serve` says."""
        return self.owner.folder / "serve.txt"

    def make_keys(self, nodes: Sequence[Machine]) -> None:
        """The root key, which is removed again, an issuer, and the keys of nodes, enrolled."""
        generate_root(self.home)
        make_issuer(self.home)
        (self.home / "root_key").unlink()  # it is offline
        for machine in nodes:
            self.enroll_node(machine)

    def enroll_node(self, machine: Machine) -> None:
        """Make a machine's key, and enrol it."""
        line = generate_edge(machine.folder / "node" / NODE_KEY, machine.name)
        add_line(self.home / NODES_FILE, line)

    def enroll_edge(self, name: str) -> Path:
        """Make an edge's key on the owner's machine, and enrol it."""
        key = self.owner.folder / f"{name}.key"
        add_line(self.home / "authorized_edges", generate_edge(key, name))
        return key

    def command(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a command of the owner's."""
        command = isthmus("cloud", *arguments)
        return self.owner.start(command, self.ray.environment(self.owner), self.log, stdout=subprocess.PIPE)

    def run(self, *arguments: str, allowed: Sequence[int] = (0,)) -> str:
        """Run a command of the owner's; returns what it prints. Raises IsthmusError where it fails."""
        process = self.command(*arguments)
        said, _ = process.communicate(timeout=COMMAND_SECONDS)
        if process.returncode not in allowed:
            raise IsthmusError(f"`isthmus cloud {arguments[0]}` ended with {process.returncode}: {self._last_line()}")
        return said.decode()

    def serve(self, *options: str) -> None:
        """Run `serve`, and wait until the cloud serves.

        Raises:
            UnreachableError: it does not.
        """
        place = self.owner.folder / "connection.txt"
        place.unlink(missing_ok=True)
        self._serve = self.command(
            "serve",
            "--address",
            self.ray.address,
            "--listen",
            f"node:{PORT}",
            "--model",
            str(self.model),
            "--edge-layers",
            self.layers,
            "--home",
            str(self.home),
            "--threads",
            str(self.threads),
            "--connection-file",
            str(place),
            *options,
        )
        deadline = time.monotonic() + SERVE_SECONDS
        while not place.exists():
            if (code := self._serve.poll()) not in (None, 0) or time.monotonic() > deadline:
                raise UnreachableError(f"`serve` on the cluster ended with {code}: {self._last_line()}")
            time.sleep(0.05)
        self.connection = place.read_text().strip()

    @contextlib.contextmanager
    def serving(self, *options: str) -> Iterator[None]:
        """Serve inside the context, and stop the cloud behind it."""
        self.serve(*options)
        try:
            yield
        finally:
            self.end_serve()
            if self.owner.is_on:
                self.run(
                    "stop", "--address", self.ray.address, "--home", str(self.home), "--grace", "5", allowed=(0, 60)
                )

    def end_serve(self, number: int = signal.SIGTERM) -> None:
        """End `serve`, which leaves the cloud as it is."""
        serve, self._serve = self._serve, None
        if serve is None or serve.poll() is not None:
            return
        # The process that was started is nsenter's, which waits for the one inside.
        for child in Path(f"/proc/{serve.pid}/task/{serve.pid}/children").read_text().split():
            os.kill(int(child), number)
        serve.wait(30)

    def status(self) -> dict[str, Any]:
        """What `isthmus cloud status --json` prints. Raises IsthmusError where it does not answer."""
        return dict(json.loads(self.run("status", "--json", "--home", str(self.home))))

    def workers(self) -> dict[int, dict[str, Any]]:
        """The workers, by number, as the status shows them."""
        return {worker["worker"]: worker for worker in self.status()["workers"]}

    def machine_of(self, number: int) -> Machine:
        """Where a worker is. Raises IsthmusError where nobody knows."""
        address = str(self.workers().get(number, {}).get("address", "")).rpartition(":")[0]
        for machine in self.machines.all.values():
            if machine.address == address:
                return machine
        raise IsthmusError(f"worker {number} is on no machine ({address or 'no address'})")

    def _last_line(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return lines[-1] if lines else "it says nothing"
