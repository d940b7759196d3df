"""The cloud of `isthmus bench chaos`, the way between it and the edges, and the tenant who misbehaves."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager, ExitStack
from http.client import HTTPException
from pathlib import Path
from typing import Any

from isthmus.cloud.telemetry import event_history
from isthmus.experiments.harness.launch import LocalCloud, free_ports
from isthmus.experiments.harness.processes import TaskProcess
from isthmus.experiments.harness.rig_settings import ChaosSettings
from isthmus.experiments.network.delay_relay import Conditions
from isthmus.experiments.network.net_space import ADDRESSES, NetSpace, Side
from isthmus.experiments.rigs.fault_points.fault_points import environment
from isthmus.experiments.rigs.hostile_tenants import hostile_process
from isthmus.experiments.rigs.network.relay import Relay
from isthmus.protocol.enrolment import ConnectionString, Quota

AS_URGENT = {"RAY_worker_niceness": "0"}
"""Ray gives its workers what the machine's other processes leave, and the edges are such processes here."""
SESSIONS = 8  # of a tenant at each worker: those of killed edges are open until the cloud notices
OUTSIDE = "127.0.0.2"
"""Where the edges find the workers, at the ports that they have: the relays listen there, so that every connection can
be cut wherever the cloud sends an edge."""


class ChaosCloud:
    """A cloud with relays in front of its workers. Everything is ended with `stack`.

    Args:
        space: The namespaces of edges and cloud; None without them.

    Attributes:
        cloud: The cloud itself; `start` starts it anew in its namespace.
    """

    def __init__(
        self,
        settings: ChaosSettings,
        workers: int,
        model: str,
        folder: Path,
        space: NetSpace | None,
        stack: ExitStack,
        *,
        hostile: bool,
    ) -> None:
        self.workers, self.points = workers, folder / "points"
        self.hostile: TaskProcess | None = None
        self._space, self._keys = space, folder / "keys"
        history = folder / "history"
        self.points.mkdir()
        history.mkdir()
        host = "127.0.0.1" if space is None else ADDRESSES["cloud"]
        with self.inside("cloud"):
            ports = free_ports(host, workers)
        self.cloud = LocalCloud(
            folder,
            model,
            *("--edge-layers", settings.edge_layers, "--threads", str(settings.threads)),
            *("--stash-bytes", settings.stash_bytes, "--workers", str(workers)),
            *("--listen", f"{host}:{ports[0]}", "--advertise", OUTSIDE),
            environment={**environment(self.points), event_history.ENVIRONMENT: str(history.absolute()), **AS_URGENT},
        )
        with self.inside("cloud"):
            stack.enter_context(self.cloud)
        self.where = ConnectionString.parse(self.cloud.connection)
        with self.inside("edge"):
            self._relays = [stack.enter_context(Relay(host, port, (OUTSIDE, port))) for port in ports]
        if hostile:
            task = {
                "workers": [str(ConnectionString(host, port, self.where.pin)) for port in ports],
                "key": str(self.enroll("hostile")),
                "batch": 2 * settings.batch,
                "seq": settings.seq,
                "seed": settings.seed,
            }
            with self.inside("edge"):
                self.hostile = stack.enter_context(hostile_process(task, folder / "hostile.log"))

    def inside(self, side: Side) -> AbstractContextManager[None]:
        """Enter the namespace of a side; nothing where there are none."""
        return contextlib.nullcontext() if self._space is None else self._space.inside(side)

    def change_way(self, conditions: Conditions) -> None:
        """Have the way between the namespaces treat packets otherwise."""
        if self._space is not None:
            self._space.change(conditions)

    def cut(self) -> None:
        """Reset every connection."""
        for relay in self._relays:
            relay.cut()

    def start(self) -> None:
        """Start the cloud anew."""
        with self.inside("cloud"):
            self.cloud.start()

    def controller(self) -> int | None:
        """The controller's process; None while it does not answer."""
        pid: int | None = self._status().get("controller_pid")
        return pid

    def pids(self) -> list[int]:
        """The processes of the workers that answer; none while the controller does not."""
        return [worker["pid"] for worker in self._status().get("workers", ()) if "pid" in worker]

    def enroll(self, name: str) -> Path:
        """The key of a new tenant."""
        key = self._keys / name
        self.cloud.enroll(name, key, Quota(max_sessions=SESSIONS * self.workers))
        return key

    def _status(self) -> dict[str, Any]:
        """The cloud's; nothing while the controller does not answer, or dies in the middle of it."""
        with self.inside("cloud"), contextlib.suppress(OSError, ValueError, HTTPException):
            return self.cloud.cloud_status()
        return {}
