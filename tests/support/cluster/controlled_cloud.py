"""A cloud's controller on a cluster of plain objects, whose rounds and clock a test turns."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from support.cluster.fake_actors import FakeActor, FakeCluster, FakeWorker
from support.cluster.owners_folder import OwnersFolder

from isthmus.cloud.cluster import cluster_controller as controller_module
from isthmus.cloud.cluster.cluster_controller import ClusterController
from isthmus.cloud.cluster.cluster_spec import ClusterSpec
from isthmus.cloud.control import controller as pages
from isthmus.cloud.control.worker import WorkerSpec
from isthmus.cloud.nodes.deliveries import Delivery
from isthmus.cloud.nodes.node_worker import NodeSpec, NodeWorker
from isthmus.protocol.enrolment import AuthorizedEdges


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Cloud:
    """A controller whose rounds the test turns, and the actors that it has started."""

    def __init__(self, owner: OwnersFolder, clock: Clock, patch: pytest.MonkeyPatch) -> None:
        self.owner, self.clock = owner, clock
        self.node = owner.node_key()
        self.now: Callable[[], float] = time.time  # of the nodes
        self.prepare: Callable[[FakeWorker], object] = lambda worker: None  # what a worker is like from its start on
        self.ray = FakeCluster(self._make)
        for name in ("start_anywhere", "wait_for"):
            patch.setattr(controller_module, name, getattr(self.ray, name))
        patch.setattr(pages, "wait_for", self.ray.wait_for)
        patch.setattr(controller_module, "named_actors", self.ray.named_actors)
        self.files_at = ""
        self.may_fetch: Callable[[], tuple[bytes, ...]] = tuple
        patch.setattr(controller_module, "ModelFiles", self._model_files)
        patch.setattr(controller_module, "log_to", lambda path: None)
        own_time = SimpleNamespace(monotonic=clock, sleep=lambda seconds: None, time=time.time)
        patch.setattr(controller_module, "time", own_time)
        own = SimpleNamespace(RLock=threading.RLock, Thread=lambda **_: SimpleNamespace(start=lambda: None))
        patch.setattr(controller_module, "threading", own)
        worker = WorkerSpec("/models/tiny", "tiny", "2:2", "fp32", "", "", "node:7443", 1, 1, 1, "")
        node = NodeSpec("cloud", owner.pin.digest, worker, "00" * 32, "tiny", "parts")
        self.spec = ClusterSpec("cloud", str(owner.folder), node, 2, 2, environment={"OMP_NUM_THREADS": "1"})

    def _make(self, kind: type, spec: NodeSpec) -> FakeWorker:
        assert kind is NodeWorker
        worker = FakeWorker(spec, self.node, lambda: self.now())
        self.prepare(worker)
        return worker

    def _model_files(self, spec: ClusterSpec, office: object, known: Callable[[], tuple[bytes, ...]]) -> Any:
        self.may_fetch = known
        return SimpleNamespace(start=lambda: self.files_at)

    def begin(self, rounds: int = 3, **changes: Any) -> ClusterController:
        """Start the controller, as Ray does it at first and whenever it has died, and have it serve."""
        self.spec = dataclasses.replace(self.spec, **changes)
        self.controller = ClusterController(self.spec)
        self.turn(rounds)
        return self.controller

    def turn(self, rounds: int = 1) -> None:
        for _ in range(rounds):
            self.controller._adopt()
            self.controller._start_missing()
            self.controller._round()
            self.controller._scale()

    def shift_owners_clock(self, seconds: float) -> None:
        """Put the clock of the owner's machine on, beside that which counts seconds."""
        now = self.controller._office._now
        self.controller._office._now = lambda: now() + seconds

    def actor(self, number: int) -> FakeActor:
        return self.ray.actors[f"isthmus-cloud-worker-{number}"]

    def worker(self, number: int) -> FakeWorker:
        found: FakeWorker = self.actor(number).inner
        return found

    def alive(self) -> list[int]:
        return sorted(each.inner.number for each in self.ray.actors.values() if not each.is_gone)

    def faults(self) -> list[str]:
        found: list[str] = self.controller.state()["faults"]
        return found


def names(delivery: Delivery) -> dict[str, bool]:
    """Who is enrolled by a delivery, and whether as another worker of the cloud."""
    found = AuthorizedEdges.parse(delivery.authorized_edges or "").joined(AuthorizedEdges.parse(delivery.workers or ""))
    return {tenant.name: tenant.stage for tenant in found._tenants.values()}


def pipeline(cloud: Cloud) -> None:
    """Start a controller with three stages, and have them serve."""
    cloud.begin(4, stages=("2:3", "3:4", "4:5"), least=3, most=3)
