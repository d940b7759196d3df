"""Four machines with a Ray cluster on them, and a cloud that is yet to serve."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from isthmus.common.errors import IsthmusError, UnreachableError
from isthmus.experiments.rigs.cluster.cluster_cloud import ClusterCloud
from isthmus.experiments.rigs.cluster.edge_runs import EdgeRun, run_options
from isthmus.experiments.rigs.cluster.machine_pool import HEAD_ID, HEAD_TYPE, SCALING, autoscaling_config
from isthmus.experiments.rigs.cluster.net_machines import Machine, Machines
from isthmus.experiments.rigs.cluster.packets import Packets
from isthmus.experiments.rigs.cluster.ray_nodes import FAST_SETTINGS, RayCluster

WORKERS_EACH: Final = 2
"""Workers that each machine takes: two of a machine that is gone have room on the other one, and a third has not."""
BACK_SECONDS = 120.0
"""For a worker, or a machine, to be there again."""
OWNER, HEAD, FIRST, SECOND = "owner", "head", "first", "second"


@dataclass(frozen=True, slots=True)
class Setting:
    """What all cases have in common.

    Attributes:
        model: folder of the model, which the machine `second` does not see.
        data: the edge's texts.
        layers: the split plan.
        steps: of each run.
        at: the step after which something happens.
        threads: of workers and edges.
    """

    model: Path
    data: Path
    layers: str
    steps: int
    at: int
    threads: int


@dataclass(frozen=True, slots=True)
class Shape:
    """How a world differs from the usual one.

    Attributes:
        storage: the control store keeps what it knows on the head's disk.
        autoscaled: Ray's autoscaler switches on the machines that take workers, each for one worker.
        captured: all packets are written down, from before Ray starts.
        settings: further variables of Ray's nodes.
    """

    storage: bool = False
    autoscaled: bool = False
    captured: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)


class World:
    """Machines with a Ray cluster and a cloud that is yet to serve.

    Attributes:
        setting: see there.
        machines: by name: the owner's, the head, two that take workers.
        ray: the cluster.
        cloud: on it.
        keys: of edges: each run is another edge's.
        packets: all that crosses; None where it is not written down.
        left: processes of the cloud that were on machines when the autoscaler ended them.
    """

    def __init__(self, setting: Setting, machines: Machines, cloud: ClusterCloud, packets: Packets | None) -> None:
        self.setting, self.machines, self.cloud, self.packets = setting, machines, cloud, packets
        self.ray = cloud.ray
        self.keys = [cloud.enroll_edge(name) for name in ("edge", "edge-2", "edge-3")]
        self.left = 0
        self._runs = 0

    @property
    def takers(self) -> list[Machine]:
        """The machines that take workers."""
        return [self.machines.all[name] for name in (FIRST, SECOND)]

    def start_node(self, machine: Machine) -> None:
        """Switch a machine on, and start its Ray."""
        self.switch_on(machine)
        self.start_ray(machine)

    def switch_on(self, machine: Machine) -> None:
        """Switch a machine on; one of them does not see the model."""
        self.machines.switch_on(machine, [self.setting.model.parent] if machine.name == SECOND else [])

    def start_ray(self, machine: Machine) -> None:
        """Start the Ray of a machine that is on."""
        self.ray.start(machine, WORKERS_EACH if machine in self.takers else 0)

    def start_autoscaled_head(self) -> None:
        """Switch the head on, with an autoscaler that may have all machines that take workers."""
        head = self.ray.head
        folder, config = head.folder / "autoscaler", head.folder / "autoscaling.json"
        folder.mkdir(mode=0o700)
        config.write_text(json.dumps(autoscaling_config(folder, len(self.takers), 1)))
        self.machines.switch_on(head)
        names = {"RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_NODE_TYPE_NAME": HEAD_TYPE}
        self.ray.start(head, options=[f"--autoscaling-config={config}"], settings=names)

    @contextlib.contextmanager
    def edge(self, connection: str = "", steps: int = 0) -> Iterator[EdgeRun]:
        """A run of the next edge, on the owner's machine.

        Args:
            connection: the connection string; by default the one that `serve` has printed.
            steps: by default those of the setting.
        """
        key = self.keys[self._runs]
        self._runs += 1
        setting, owner = self.setting, self.cloud.owner
        where, count = connection or self.cloud.connection, steps or setting.steps
        options = run_options(where, key, setting.data, count, setting.threads)
        with EdgeRun(owner, self.ray.environment(owner), owner.folder / f"run-{self._runs}", options) as run:
            yield run

    def wait(self, what: str, holds: Callable[[], bool], seconds: float = BACK_SECONDS) -> float:
        """Wait until something holds; returns the seconds that it took. Raises UnreachableError where it does not."""
        begun = time.monotonic()
        while True:
            with contextlib.suppress(UnreachableError):
                if holds():
                    return time.monotonic() - begun
            if time.monotonic() - begun > seconds:
                raise UnreachableError(f"{what}: not within {seconds:.0f} s")
            time.sleep(0.1)

    def serves(self, number: int) -> bool:
        """Whether a worker serves now."""
        return self.cloud.workers().get(number, {}).get("state") == "serving"

    def serves_on(self, machine: Machine) -> list[int]:
        """Workers that serve on a machine now."""
        serving = [number for number, worker in self.cloud.workers().items() if worker["state"] == "serving"]
        return [number for number in serving if self.cloud.machine_of(number) is machine]

    def place_of(self, number: int) -> tuple[str, int]:
        """Where a worker is, and the process that it is there."""
        worker = self.cloud.workers().get(number, {})
        return str(worker.get("address", "")), int(worker.get("pid", 0))

    def session_worker(self) -> int:
        """The worker that has the edge's session. Raises IsthmusError where none has."""
        for number, worker in self.cloud.workers().items():
            if worker.get("sessions"):
                return number
        raise IsthmusError("no worker has a session")

    def session_machine(self) -> Machine:
        """Where the edge's session is. Raises IsthmusError where there is none."""
        return self.cloud.machine_of(self.session_worker())

    def calls_on(self, machine: Machine) -> int:
        """Calls of edges that a machine's workers have answered since they started."""
        calls = self.cloud.calls_answered()
        return sum(count for number, count in calls.items() if self.cloud.machine_of(number) is machine)


@contextlib.contextmanager
def world(setting: Setting, root: Path, shape: Shape = Shape()) -> Iterator[World]:
    """Machines that are on, in one Ray cluster, with keys. All of it is gone behind the context.

    Args:
        setting: see there.
        root: folder for it, new; its path is short, as Ray's sockets are in it.
        shape: see there.

    Raises:
        ConfigError: this machine cannot make namespaces.
        UnreachableError: Ray does not start.
    """
    with contextlib.ExitStack() as stack:
        machines = stack.enter_context(Machines(root))
        owner, head, first, second = (machines.add(name) for name in (OWNER, HEAD, FIRST, SECOND))
        settings = {**FAST_SETTINGS, **(SCALING if shape.autoscaled else {}), **shape.settings}
        ray = RayCluster(head, storage=shape.storage, settings=settings)
        cloud = ClusterCloud(machines, owner, ray, setting.model, setting.layers, setting.threads)
        cloud.make_keys([first, second])
        packets = stack.enter_context(Packets(machines, root / "packets.bin")) if shape.captured else None
        made = World(setting, machines, cloud, packets)
        if shape.autoscaled:
            made.start_autoscaled_head()
        else:
            made.start_node(head)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(made.start_node, (owner,) if shape.autoscaled else (owner, first, second)))
        yield made
