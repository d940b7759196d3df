"""A cluster of plain objects, as the owner's commands join it, and a cloud there that one of them looks after."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from support.cluster.fake_actors import FakeActor, FakeCluster
from support.cluster.owners_folder import OwnersFolder

from isthmus.cloud.cluster import attached, watched_cloud
from isthmus.cloud.cluster.attached import serve_on_cluster
from isthmus.cloud.cluster.cluster_controller import ClusterController
from isthmus.cloud.cluster.cluster_spec import ClusterSpec
from isthmus.cloud.cluster.joined_cluster import Node
from isthmus.cloud.control.serve_options import ClusterOptions, ServeOptions
from isthmus.cloud.control.worker import WorkerSpec
from isthmus.cloud.nodes.node_worker import NodeSpec
from isthmus.common.errors import UnreachableError
from isthmus.protocol.enrolment import ConnectionString

NODES = [
    Node("id1", "10.0.0.1", "gpu-1", 2, {}),
    Node("id2", "10.0.0.1", "gpu-1b", 1, {}),
    Node("id3", "10.0.0.1", "head", 0, {}),
]
"""Of one machine, so that Ray needs no TLS."""


class FakeController:
    """A cloud's controller, whose answers a test chooses."""

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec, self.counts = spec, (spec.least, spec.most)
        self.states: list[dict[str, Any]] = []  # what `state` says before all is well
        self.faults: list[str] = []
        self.failure: Exception | None = None
        self.stops: list[float] = []
        self.finishes = True

    def state(self) -> dict[str, Any]:
        if self.failure is not None:
            raise self.failure
        usual = {"ready": True, "waits": [], "faults": self.faults, "places": ["10.0.0.2:7443", "10.0.0.1:7444"]}
        known = {"spec": self.spec, "counts": self.counts, "stopped": False}
        return {**usual, **known, **(self.states.pop(0) if self.states else {})}

    def scale(self, least: int, most: int) -> None:
        self.counts = (least, most)

    def stop(self, grace: float) -> bool:
        self.stops.append(grace)
        return self.finishes


class FakeJoined:
    """A cluster that was joined."""

    def __init__(self, ray: Ray, address: str) -> None:
        ray.joined.append(address)
        if ray.refusals:
            ray.refusals -= 1
            raise UnreachableError(f"this machine is no node of a Ray cluster at {address}")
        self._ray, self.control_store = ray, ("10.0.0.1", 6379)

    def nodes(self) -> list[Node]:
        return self._ray.nodes

    def addresses(self) -> set[str]:
        return {node.address for node in self._ray.nodes}

    def keep(self, name: str, value: bytes) -> None:
        self._ray.kept[name] = value

    def kept(self, name: str) -> bytes | None:
        if self._ray.is_mute:
            raise UnreachableError("Ray does not answer")
        return self._ray.kept.get(name)

    def leave(self) -> None:
        self._ray.left += 1


class Ray:
    """The cluster, its nodes, what its control store keeps, and who has joined and left it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.nodes, self.left, self.refusals = list(NODES), 0, 0
        self.kept: dict[str, bytes] = {}
        self.is_mute = False  # whether the control store does not tell what it keeps
        self.joined: list[str] = []
        self.cluster = FakeCluster(self._make)
        self.prepare: Callable[[FakeController], object] = lambda controller: None
        for module in (attached, watched_cloud):
            patch.setattr(module, "JoinedCluster", lambda address: FakeJoined(self, address))
            patch.setattr(module, "find_actor", self.cluster.find_actor)
            patch.setattr(module, "stop_on_signals", lambda stop: None)
        patch.setattr(watched_cloud, "start_here", self.cluster.start_here)
        patch.setattr(attached, "named_actors", self.cluster.named_actors)
        patch.setattr(attached, "log_to", lambda path: None)

    def _make(self, kind: type, spec: ClusterSpec) -> FakeController:
        assert kind is ClusterController
        controller = FakeController(spec)
        self.prepare(controller)
        return controller

    def lose(self) -> None:
        """Lose the control store, which comes back with nothing in it."""
        self.cluster.actors.clear()
        self.kept.clear()

    @property
    def actor(self) -> FakeActor:
        return self.cluster.actors["isthmus-cloud-controller"]

    @property
    def controller(self) -> FakeController:
        found: FakeController = self.actor.inner
        return found


class Stop:
    """A signal that comes after some looks; each wait moves the clock."""

    def __init__(self, looks: int) -> None:
        self.now, self._looks = 0.0, looks
        self.then: Callable[[int], object] = lambda look: None
        self.look = 0

    def is_set(self) -> bool:
        return self.look >= self._looks

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        self.look += 1
        self.then(self.look)
        return self.is_set()


class Watched:
    """A cloud that is looked after, with a clock and a control store of the test's own."""

    def __init__(self, ray: Ray, owner: OwnersFolder, patch: pytest.MonkeyPatch) -> None:
        self.ray, self.is_up, self._patch = ray, True, patch
        self.said = io.StringIO()
        worker = WorkerSpec("/models/tiny", "tiny", "2:2", "fp32", "", "", "node:7443", 1, 1, 1, "")
        node = NodeSpec("cloud", owner.pin.digest, worker, "", "tiny", "")
        self.state = owner.folder / "serving.json"
        self.state.write_text("{}")
        self.spec = ClusterSpec("cloud", str(owner.folder), node, 2, 4)
        patch.setattr(watched_cloud, "is_open", lambda address: self.is_up)
        joined = FakeJoined(ray, "auto")
        console = Console(file=self.said, width=200)
        self.watched = watched_cloud.WatchedCloud(joined, ClusterOptions("auto"), self.spec, console)

    def look_after(self, stop: Stop) -> bool:
        self._patch.setattr(watched_cloud, "time", SimpleNamespace(monotonic=lambda: stop.now))
        return self.watched.look_after(stop)


def serve(options: ServeOptions, **changes: Any) -> ConnectionString:
    """The connection string that a detached `serve` prints."""
    said: list[str] = []
    serve_on_cluster(dataclasses.replace(options, **changes), said.append)
    (connection,) = said
    return ConnectionString.parse(connection)
