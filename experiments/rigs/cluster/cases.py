"""What happens to a cloud on several machines while an edge trains, and what the edge notices of it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from isthmus.common.errors import IsthmusError, UnreachableError
from isthmus.experiments.rigs.cluster.cluster_cloud import ClusterCloud
from isthmus.experiments.rigs.cluster.edge_runs import EdgeRun, Finished, run_options
from isthmus.experiments.rigs.cluster.machine_pool import (
    HEAD_ID,
    HEAD_TYPE,
    SCALING,
    WORKER_TYPE,
    Provisioner,
    autoscaling_config,
)
from isthmus.experiments.rigs.cluster.net_machines import Machine, Machines
from isthmus.experiments.rigs.cluster.packets import Packets
from isthmus.experiments.rigs.cluster.ray_nodes import FAST_SETTINGS, RayCluster

WORKERS_EACH: Final = 4
"""Workers that each machine takes."""
CUT_SECONDS, HEAD_SECONDS = 8.0, 10.0
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


class World:
    """Machines with a Ray cluster and a cloud that is yet to serve.

    Attributes:
        setting: see there.
        machines: by name: the owner's, the head, two that take workers.
        ray: the cluster.
        cloud: on it.
        key: the edge's.
    """

    def __init__(self, setting: Setting, machines: Machines, ray: RayCluster, cloud: ClusterCloud, key: Path) -> None:
        self.setting, self.machines, self.ray, self.cloud, self.key = setting, machines, ray, cloud, key
        self._runs = 0
        self._packets: Packets | None = None

    def start_node(self, machine: Machine) -> None:
        """Switch a machine on, and start its Ray."""
        takes = machine.name in (FIRST, SECOND)
        self.machines.switch_on(machine, [self.setting.model.parent] if machine.name == SECOND else [])
        self.ray.start(machine, WORKERS_EACH if takes else 0)

    def watch_packets(self) -> None:
        """Write down all that crosses from now on."""
        self._packets = Packets(self.machines, self.machines.root / "packets.bin").__enter__()

    def end_packets(self) -> Packets:
        """Write down no more. Raises IsthmusError where nothing was written down."""
        if self._packets is None:
            raise IsthmusError("no packets were written down")
        self._packets.__exit__()
        return self._packets

    def start_head(self, most: int = 0) -> None:
        """Switch the head on, with an autoscaler where it may have up to `most` machines."""
        head = self.ray.head
        if not most:
            self.start_node(head)
            return
        folder = head.folder / "autoscaler"
        folder.mkdir(mode=0o700)
        config = head.folder / "autoscaling.json"
        config.write_text(json.dumps(autoscaling_config(folder, most, 1)))
        self.machines.switch_on(head)
        names = {"RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_NODE_TYPE_NAME": HEAD_TYPE}
        self.ray.start(head, options=[f"--autoscaling-config={config}"], settings=names)

    @contextlib.contextmanager
    def edge(self) -> Iterator[EdgeRun]:
        """A run of the edge on the owner's machine."""
        self._runs += 1
        setting, owner = self.setting, self.cloud.owner
        options = run_options(self.cloud.connection, self.key, setting.data, setting.steps, setting.threads)
        out = owner.folder / f"run-{self._runs}"
        with EdgeRun(owner, self.ray.environment(owner), out, options) as run:
            yield run

    def wait(self, what: str, holds: Callable[[], bool], seconds: float = BACK_SECONDS) -> float:
        """Wait until something holds; returns the seconds that it took. Raises UnreachableError."""
        begun = time.monotonic()
        while True:
            with contextlib.suppress(IsthmusError):
                if holds():
                    return time.monotonic() - begun
            if time.monotonic() - begun > seconds:
                raise UnreachableError(f"{what}: not within {seconds:.0f} s")
            time.sleep(0.2)

    def serves(self, number: int) -> bool:
        """Whether a worker serves now."""
        return self.cloud.workers().get(number, {}).get("state") == "serving"

    def place_of(self, number: int) -> tuple[str, int]:
        """Where a worker is, and the process that it is there."""
        worker = self.cloud.workers().get(number, {})
        return str(worker.get("address", "")), int(worker.get("pid", 0))

    def session_machine(self) -> Machine:
        """Where the edge's session is. Raises IsthmusError where there is none."""
        for number, worker in self.cloud.workers().items():
            if worker.get("sessions"):
                return self.cloud.machine_of(number)
        raise IsthmusError("no worker has a session")


@contextlib.contextmanager
def world(setting: Setting, root: Path, case: str) -> Iterator[World]:
    """Machines that are on, in one Ray cluster, with keys. All of it is gone behind the context.

    Args:
        setting: see there.
        root: folder for it, new.
        case: name of the case, for which the control store has a disk, packets are written down, or Ray has an
            autoscaler that switches machines on.
    """
    autoscaled = case in AUTOSCALED
    with Machines(root) as machines:
        owner, head, first, second = (machines.add(name) for name in (OWNER, HEAD, FIRST, SECOND))
        ray = RayCluster(
            head, storage=case in WITH_STORAGE, settings={**FAST_SETTINGS, **(SCALING if autoscaled else {})}
        )
        cloud = ClusterCloud(machines, owner, ray, setting.model, setting.layers, setting.threads)
        cloud.make_keys([first, second])
        made = World(setting, machines, ray, cloud, cloud.enroll_edge("edge"))
        if case in WATCHED:
            made.watch_packets()
        made.start_head(most=2 if autoscaled else 0)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(made.start_node, (owner,) if autoscaled else (owner, first, second)))
        yield made


# Cases ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Happened:
    """What a case has shown.

    Attributes:
        run: the edge's, which went through it.
        recovery: seconds until all was well: what the edge lost, where it lost something, and else what the case says.
        more: further figures.
    """

    run: Finished
    recovery: float
    more: dict[str, Any]


def two_nodes(world: World) -> Happened:
    """An edge trains over two machines' workers; another machine has fetched the model from the first."""
    with world.cloud.serving("--workers", "2"), world.edge() as run:
        machines = {world.cloud.machine_of(number).name for number in (0, 1)}
        done = run.finish()
        return Happened(done, done.lost, {"machines": sorted(machines)})


def worker_killed(world: World) -> Happened:
    """The power of the machine that has the edge's session is cut; a second worker is up elsewhere."""
    with world.cloud.serving("--workers", "2"):
        with world.edge() as run:
            run.wait_for_step(world.setting.at)
            machine = world.session_machine()
            (number,) = (each for each in (0, 1) if world.cloud.machine_of(each) is machine)
            before = world.place_of(number)
            machine.cut_power()
            back = world.wait(
                "the worker, elsewhere", lambda: world.serves(number) and world.place_of(number) != before
            )
            done = run.finish()
        return Happened(done, done.lost, {"worker_back_s": round(back, 1), "killed": machine.name})


def stage_killed(world: World) -> Happened:
    """The power of the machine with a pipeline's second stage is cut; it is started again on the other one."""
    with world.cloud.serving("--pipeline", "2"), world.edge() as run:
        run.wait_for_step(world.setting.at)
        machine = world.cloud.machine_of(1)
        machine.cut_power()
        done = run.finish()
        return Happened(done, done.lost, {"killed": machine.name, "now_on": world.cloud.machine_of(1).name})


def link_cut(world: World) -> Happened:
    """The link of the machine that has the edge's session loses all packets for a while, and heals."""
    with world.cloud.serving("--workers", "2"), world.edge() as run:
        run.wait_for_step(world.setting.at)
        machine = world.session_machine()
        with world.machines.link_cut(machine):
            time.sleep(CUT_SECONDS)
        done = run.finish()
        return Happened(done, done.lost, {"cut": machine.name, "cut_s": CUT_SECONDS})


def head_killed(world: World) -> Happened:
    """The head's power is cut for ten seconds, its control store is on its disk; a worker is killed meanwhile."""
    cloud = world.cloud
    with cloud.serving("--workers", "2"), world.edge() as run:
        run.wait_for_step(world.setting.at)
        busy = world.session_machine()
        idle = next(number for number in (0, 1) if cloud.machine_of(number) is not busy)
        killed = world.place_of(idle)
        pid = _inside(cloud.machine_of(idle), killed[1])
        cloud.ray.head.cut_power()
        psutil.Process(pid).kill()
        during = run.steps()
        time.sleep(HEAD_SECONDS)
        trained = run.steps() - during
        world.start_node(cloud.ray.head)
        back = world.wait("another worker", lambda: world.serves(idle) and world.place_of(idle) != killed)
        done = run.finish()
        return Happened(done, done.lost, {"steps_meanwhile": trained, "worker_back_s": round(back, 1)})


def head_lost(world: World) -> Happened:
    """The head's power is cut, and its control store is lost; the operator starts all of Ray again."""
    cloud = world.cloud
    with cloud.serving("--workers", "2"), world.edge() as run:
        run.wait_for_step(world.setting.at)
        for machine in world.machines.all.values():
            if machine is not cloud.owner:
                machine.cut_power()
        _end_ray(cloud.owner)
        for machine in (
            cloud.ray.head,
            *(each for each in world.machines.all.values() if each.name in (FIRST, SECOND)),
        ):
            world.start_node(machine)
        world.ray.start(cloud.owner)
        done = run.finish()
        return Happened(done, done.lost, {})


def serve_ended(world: World) -> Happened:
    """`serve` is ended, and started again; then the number of workers is changed."""
    cloud = world.cloud
    with cloud.serving("--workers", "2"), world.edge() as run:
        run.wait_for_step(world.setting.at)
        cloud.end_serve()
        before = run.steps()
        run.wait_for_step(before + 1)
        cloud.serve("--workers", "2")
        cloud.run("scale", "3", "--address", cloud.ray.address)
        grown = world.wait("a third worker", lambda: world.serves(2))
        cloud.run("scale", "2", "--address", cloud.ray.address)
        world.wait("two workers", lambda: set(cloud.workers()) == {0, 1})
        done = run.finish()
        return Happened(done, done.lost, {"third_worker_s": round(grown, 1)})


def machine_added(world: World) -> Happened:
    """Calls wait, so the cloud wants a worker more and Ray's autoscaler a machine for it; both are ended again."""
    cloud, folder = world.cloud, world.cloud.ray.head.folder / "autoscaler"
    first = world.machines.all[FIRST]

    def start(machine: Machine, name: str) -> None:
        world.machines.switch_on(machine, [world.setting.model.parent] if machine is not first else [])
        world.ray.start(machine, 1, settings={"RAY_CLOUD_INSTANCE_ID": name, "RAY_NODE_TYPE_NAME": WORKER_TYPE})

    with Provisioner(folder, [first, world.machines.all[SECOND]], start) as provisioner:
        with cloud.serving("--workers", "1"), world.edge() as run:
            run.wait_for_step(world.setting.at)
            cloud.run("scale", "2", "--address", cloud.ray.address)
            added = world.wait("a second worker", lambda: world.serves(1))
            machines = len(provisioner.on)
            cloud.run("scale", "1", "--address", cloud.ray.address)
            ended = world.wait("one machine", lambda: len(provisioner.on) == 1)
            done = run.finish()
        world.wait("no machine", lambda: not provisioner.on)
    return Happened(done, done.lost, {"machines": machines, "added_s": round(added, 1), "ended_s": round(ended, 1)})


CASES: Final[dict[str, Callable[[World], Happened]]] = {
    "two nodes": two_nodes,
    "worker's machine killed": worker_killed,
    "stage's machine killed": stage_killed,
    "link cut and healed": link_cut,
    "head killed, with storage": head_killed,
    "head lost, without storage": head_lost,
    "serve ended and attached": serve_ended,
    "machine added and ended": machine_added,
}
"""By the name that the table has for them."""
WATCHED: Final = ("secrets",)
WITH_STORAGE: Final = ("head killed, with storage", *WATCHED)
AUTOSCALED: Final = ("machine added and ended",)


def _inside(machine: Machine, pid: int) -> int:
    """The id that this process knows a machine's process by."""
    for process in processes_of(machine):
        with contextlib.suppress(psutil.Error, OSError):
            ids = Path(f"/proc/{process.pid}/status").read_text().split("NSpid:")[1].split("\n")[0].split()
            if int(ids[-1]) == pid and len(ids) > 1:
                return int(ids[0])
    raise UnreachableError(f"the machine {machine.name} has no process {pid}")


def processes_of(machine: Machine) -> list[psutil.Process]:
    """All processes of a machine; those that were started there from outside are no children of its first one."""
    own = Path(f"/proc/{machine.first_pid}/ns/pid").readlink()
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{process.pid}/ns/pid").readlink() == own:
                found.append(process)
    return found


def _end_ray(machine: Machine) -> None:
    """Kill a machine's Ray, as `ray stop --force` would, and nothing else."""
    for process in processes_of(machine):
        with contextlib.suppress(psutil.Error):
            words = " ".join(process.cmdline())
            if "raylet" in process.name() or "ray start" in words or "ray::" in words:
                process.kill()


def processes_left(root: Path) -> int:
    """Processes that have a machine's folder in their command or environment still."""
    left = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            data = Path(f"/proc/{process.pid}/environ").read_bytes() + Path(f"/proc/{process.pid}/cmdline").read_bytes()
            if (
                str(root).encode() in data
                and process.status() != psutil.STATUS_ZOMBIE
                and process.pid != psutil.Process().pid
            ):
                left += 1
    return left
