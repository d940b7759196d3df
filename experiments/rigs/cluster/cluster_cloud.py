"""A cloud on several machines, and the commands of its owner, on a machine of its own that takes no workers."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from isthmus.cloud.cluster.issuing import NODES_FILE
from isthmus.common.errors import IsthmusError, UnreachableError
from isthmus.experiments.harness.processes import isthmus
from isthmus.experiments.network.net_space import within
from isthmus.experiments.rigs.cluster.machine_processes import cloud_processes
from isthmus.experiments.rigs.cluster.net_machines import Machine, Machines
from isthmus.experiments.rigs.cluster.ray_nodes import RayCluster
from isthmus.protocol.enrolment import add_line
from isthmus.protocol.secure.keys import NODE_KEY, generate_edge, generate_root, make_issuer

SERVE_SECONDS = 180.0
PORT = 7443
METRICS = "127.0.0.1:9464"
COMMAND_SECONDS = 120.0
GRACE_SECONDS = 5
"""For the calls in flight when the cloud is stopped; there are none."""
SETTLE_SECONDS, LEAVE_SECONDS = 2.0, 10.0
"""After `stop`: for a start that it has crossed to show, and then for processes that are ending."""


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
        processes_serving: processes of the cloud just before it was stopped: the control of `processes_left`.
    """

    machines: Machines
    owner: Machine
    ray: RayCluster
    model: Path
    layers: str = "2:2"
    threads: int = 1
    connection: str = ""
    processes_serving: int = field(default=0, init=False)
    _looks_after: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def home(self) -> Path:
        """The owner's folder."""
        return self.owner.folder / "cloud"

    def make_keys(self, nodes: Sequence[Machine]) -> None:
        """The root key, which is removed again, an issuer, and the keys of nodes, enrolled."""
        generate_root(self.home)
        make_issuer(self.home)
        (self.home / "root_key").unlink()  # it is offline
        for machine in nodes:
            line = generate_edge(machine.folder / "node" / NODE_KEY, machine.name)
            add_line(self.home / NODES_FILE, line)

    def enroll_edge(self, name: str) -> Path:
        """Make an edge's key on the owner's machine, and enrol it."""
        key = self.owner.folder / f"{name}.key"
        add_line(self.home / "authorized_edges", generate_edge(key, name))
        return key

    # The owner's commands -----------------------------------------------------------------------------------------

    def run(self, *arguments: str) -> None:
        """Run a command of the owner's that names the cluster.

        Raises:
            IsthmusError: it fails.
            UnreachableError: it takes too long.
        """
        self._wait(self._start(*arguments), arguments[0])

    def serve(self, *options: str) -> None:
        """Run `serve`, and wait until the cloud serves. Raises UnreachableError where it does not."""
        place = self.owner.folder / "connection.txt"
        place.unlink(missing_ok=True)
        about = {
            "--listen": f"node:{PORT}",
            "--metrics": METRICS,
            "--model": str(self.model),
            "--edge-layers": self.layers,
            "--home": str(self.home),
            "--threads": str(self.threads),
            "--connection-file": str(place),
        }
        self._look_after("serve", *(word for pair in about.items() for word in pair), *options, until=place.exists)
        self.connection = place.read_text().strip()

    def attach(self) -> None:
        """Run `attach`, and wait until it looks after the cloud. Raises UnreachableError where it does not."""
        said = len(self.said())
        self._look_after("attach", until=lambda: "Ctrl-Cleavesit" in self.said()[said:])

    def end_serve(self) -> None:
        """End `serve`, or `attach`, with SIGTERM, which leaves the cloud as it is. Raises what `run` does."""
        process, self._looks_after = self._looks_after, None
        if process is not None:
            self.owner.signal(process, signal.SIGTERM)
            self._wait(process, "serve")

    @contextlib.contextmanager
    def serving(self, *options: str) -> Iterator[None]:
        """Serve inside the context; behind it end `serve`, count the cloud's processes, and stop the cloud.

        After an error the cloud is left as it is: its machines are about to lose their power.
        """
        self.serve(*options)
        yield
        self.end_serve()
        self.processes_serving = self.processes()
        self.run("stop", "--grace", str(GRACE_SECONDS))

    # How it is ----------------------------------------------------------------------------------------------------

    def said(self) -> str:
        """What the owner's commands have said so far, without white space, as their lines are broken anywhere."""
        return "".join(self._log.read_text(errors="replace").split()) if self._log.exists() else ""

    def status(self) -> dict[str, Any]:
        """What `/status` says. Raises UnreachableError where the controller does not answer."""
        return dict(json.loads(self._page("status")))

    def workers(self) -> dict[int, dict[str, Any]]:
        """The workers, by number, as the status shows them. Raises UnreachableError."""
        return {worker["worker"]: worker for worker in self.status()["workers"]}

    def machine_of(self, number: int) -> Machine:
        """Where a worker is. Raises UnreachableError where nobody knows."""
        address = str(self.workers().get(number, {}).get("address", "")).rpartition(":")[0]
        for machine in self.machines.all.values():
            if machine.address == address:
                return machine
        raise UnreachableError(f"worker {number} is on no machine ({address or 'no address'})")

    def calls_answered(self) -> dict[int, int]:
        """Calls of edges that the workers of now have answered, by worker; of one worker alone, nothing is said.

        Raises:
            UnreachableError: the controller does not answer.
        """
        calls: Counter[int] = Counter()
        for family in text_string_to_metric_families(self._page("metrics").decode()):
            for sample in family.samples:
                if sample.name == "isthmus_calls_total" and "worker" in sample.labels:
                    calls[int(sample.labels["worker"])] += int(sample.value)
        return dict(calls)

    def processes_left(self) -> int:
        """Processes of the stopped cloud on the machines that are on: they should have ended by themselves."""
        time.sleep(SETTLE_SECONDS)
        deadline = time.monotonic() + LEAVE_SECONDS
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def processes(self) -> int:
        """Processes of the cloud, and of its owner's commands and edges, on the machines that are on."""
        return sum(len(cloud_processes(machine)) for machine in self.machines.all.values() if machine.is_on)

    @property
    def _log(self) -> Path:
        return self.owner.folder / "commands.txt"

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = isthmus("cloud", *arguments, "--address", self.ray.address)
        return self.owner.start(command, self.ray.environment(self.owner), self._log)

    def _wait(self, process: subprocess.Popen[bytes], name: str) -> None:
        try:
            code = process.wait(COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            raise UnreachableError(f"`isthmus cloud {name}` has not ended within {COMMAND_SECONDS:.0f} s") from None
        if code:
            raise IsthmusError(f"`isthmus cloud {name}` ended with {code}: {self._last_line()}")

    def _look_after(self, *arguments: str, until: Callable[[], bool]) -> None:
        self._looks_after = self._start(*arguments)
        deadline = time.monotonic() + SERVE_SECONDS
        while not until():
            if (code := self._looks_after.poll()) is not None or time.monotonic() > deadline:
                raise UnreachableError(f"`isthmus cloud {arguments[0]}` does not serve ({code}): {self._last_line()}")
            time.sleep(0.05)

    def _page(self, name: str) -> bytes:
        """A page of the controller, which listens on the owner's machine alone."""
        try:
            with within(self.owner.namespace), urllib.request.urlopen(f"http://{METRICS}/{name}", timeout=5) as answer:
                return bytes(answer.read())
        except OSError as error:
            raise UnreachableError(f"the controller does not show its {name}: {error}") from None

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
        return lines[-1] if lines else "it says nothing"
