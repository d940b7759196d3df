"""What happens to a cloud on several machines while an edge trains, and what the edge notices of it."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import psutil

from isthmus.common.errors import IsthmusError
from isthmus.experiments.rigs.cluster.cluster_world import Shape, World
from isthmus.experiments.rigs.cluster.edge_runs import Finished
from isthmus.experiments.rigs.cluster.machine_pool import WORKER_TYPE, Provisioner
from isthmus.experiments.rigs.cluster.machine_processes import end_ray, has_ray, outer_pid
from isthmus.experiments.rigs.cluster.net_machines import Machine
from isthmus.protocol.enrolment import ConnectionString

HEAD_SECONDS, LONG_HEAD_SECONDS = 10.0, 90.0
"""For which the head is away; the second is more than Ray's processes wait for it by default (60)."""
LONG_RUN_SECONDS: Final = LONG_HEAD_SECONDS + 30.0
"""For which an edge trains where a usual run would end before the case has."""
LONG_WAIT: Final = {"RAY_gcs_rpc_server_reconnect_timeout_s": "300"}
"""Of all nodes: how long Ray's processes wait for the head."""
DATAGRAMS: Final = 10
"""That are sent each way to see whether a link carries them."""
SHORT_STEPS: Final = 4
"""Of a run that shows that a worker answers."""


@dataclass(frozen=True, slots=True)
class Happened:
    """What a case has shown.

    Attributes:
        runs: of the edges that went through it.
        more: further figures.
    """

    runs: list[Finished]
    more: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """A case.

    Attributes:
        happens: what happens; it stops the cloud in the end, and leaves machines and Ray on.
        shape: of its world.
        at_most: seconds that an edge may lose; None where nothing is promised.
        seconds: for which an edge has to train, from the step at which something happens; 0 for the setting's steps.

    `happens` raises IsthmusError where what should happen did not, or the cloud does not come back.
    """

    happens: Callable[[World], Happened]
    shape: Shape = dataclasses.field(default_factory=Shape)
    at_most: float | None = None
    seconds: float = 0.0


def two_nodes(world: World) -> Happened:
    """Two edges train at once, over two machines' workers; one machine has fetched the model from the owner's."""
    with world.cloud.serving("--workers", "2"), world.edge() as one, world.edge() as other:
        runs = [one.finish(), other.finish()]
        answered = {machine.name: world.calls_on(machine) for machine in world.takers}
    if not all(answered.values()):
        raise IsthmusError(f"the edges' calls were answered on one machine alone: {answered}")
    return Happened(runs, {"calls_answered": answered})


def worker_killed(world: World) -> Happened:
    """The power of the machine that has the edge's session is cut; a second worker is up elsewhere."""
    with world.cloud.serving("--workers", "2"), world.edge() as run:
        run.wait_for_step(world.setting.at)
        number = world.session_worker()
        machine, before = world.cloud.machine_of(number), world.place_of(number)
        check_apart(world)
        machine.cut_power()
        run.check_trains("the machine lost its power")
        back = world.wait("the worker, elsewhere", lambda: world.serves(number) and world.place_of(number) != before)
        return Happened([run.finish()], {"worker_back_s": round(back, 1), "killed": machine.name})


def stage_killed(world: World) -> Happened:
    """The power of the machine with a pipeline's second stage is cut; it is started again on the other one."""
    with world.cloud.serving("--pipeline", "2"), world.edge() as run:
        run.wait_for_step(world.setting.at)
        machine = world.cloud.machine_of(1)
        check_apart(world)
        machine.cut_power()
        run.check_trains("the machine lost its power")
        done = run.finish()
        return Happened([done], {"killed": machine.name, "now_on": world.cloud.machine_of(1).name})


def check_apart(world: World) -> None:
    """Raise IsthmusError where one machine has both workers, or stages: then nothing would be left of the cloud."""
    if world.cloud.machine_of(0) is world.cloud.machine_of(1):
        raise IsthmusError(f"both workers are on {world.cloud.machine_of(0).name}, and should be on a machine each")


def link_cut(world: World) -> Happened:
    """The link of the machine that has the edge's session loses all packets until Ray gives the machine up, and heals.

    The machine then joins with a new Ray, a third worker has room on it alone, and an edge trains over that one.
    """
    cloud, (first, second) = world.cloud, world.takers
    with cloud.serving("--workers", "2"), world.edge() as run:
        run.wait_for_step(world.setting.at)
        number = world.session_worker()
        machine = cloud.machine_of(number)
        other = second if machine is first else first
        (elsewhere,) = (each for each in (0, 1) if each != number)
        if _lost(world, machine):
            raise IsthmusError(f"the link of {machine.name} loses packets before it is cut")
        with world.machines.link_cut(machine):
            cut = time.monotonic()
            lost = _lost(world, machine)
            if lost != 2 * DATAGRAMS:
                raise IsthmusError(f"the link of {machine.name} is cut, and lost {lost} of {2 * DATAGRAMS} datagrams")
            world.wait("the edge's session, elsewhere", lambda: bool(cloud.workers()[elsewhere].get("sessions")))
            run.wait_for_step(run.steps() + 1)
            world.wait("the worker, elsewhere", lambda: number in world.serves_on(other))
            cut = time.monotonic() - cut
            run.check_trains("the link was healed")
        if _lost(world, machine):
            raise IsthmusError(f"the link of {machine.name} loses packets after it has healed")
        ended = world.wait("the end of the Ray that was given up", lambda: not has_ray(machine))
        world.start_ray(machine)
        cloud.run("scale", "3")
        world.wait("a worker behind the healed link", lambda: world.serves_on(machine) == [2])
        done, before = run.finish(), world.calls_on(machine)
        there = dataclasses.replace(ConnectionString.parse(cloud.connection), host=machine.address, others=())
        port = int(world.place_of(2)[0].rpartition(":")[2])
        with world.edge(str(dataclasses.replace(there, port=port)), SHORT_STEPS) as short:
            again = short.finish()
        answered = world.calls_on(machine) - before
    if again.failure or not answered:
        raise IsthmusError(f"the worker behind the healed link answers no calls: {again.failure or 'none came'}")
    seen = {"cut": machine.name, "cut_s": round(cut, 1), "datagrams_lost": lost, "ray_ended_s": round(ended, 1)}
    return Happened([done], {**seen, "calls_over_healed_link": answered})


def _lost(world: World, machine: Machine) -> int:
    """How many of `DATAGRAMS` from the owner's machine to another one, and of as many back, are lost."""
    owner, sent = world.cloud.owner, [os.urandom(64) for _ in range(DATAGRAMS)]
    there, back = world.machines.delivered(owner, machine, sent), world.machines.delivered(machine, owner, sent)
    return 2 * DATAGRAMS - there - back


def head_away(world: World, seconds: float) -> Happened:
    """The head's power is cut for a while, its control store is on its disk; a worker is killed meanwhile."""
    cloud, head = world.cloud, world.ray.head
    with cloud.serving("--workers", "2"), world.edge() as run:
        run.wait_for_step(world.setting.at)
        busy = world.session_worker()
        (idle,) = (number for number in (0, 1) if number != busy)
        killed = world.place_of(idle)
        pid = outer_pid(cloud.machine_of(idle), killed[1])
        head.cut_power()
        psutil.Process(pid).kill()
        during = run.steps()
        time.sleep(seconds)
        trained = run.steps() - during
        if not trained:
            raise IsthmusError(f"the edge made no step in the {seconds:.0f} s in which the head was away")
        world.start_node(head)
        run.check_trains("the head was back")
        back = world.wait("another worker", lambda: world.serves(idle) and world.place_of(idle) != killed)
        return Happened([run.finish()], {"steps_meanwhile": trained, "worker_back_s": round(back, 1)})


def head_lost(world: World, *, attached: bool = False) -> Happened:
    """The head's power is cut, and its control store is lost; the operator starts all of Ray again.

    `serve`, or `attach` in its place, then starts the cloud again.
    """
    cloud = world.cloud
    nodes = [world.ray.head, *world.takers]
    with cloud.serving("--workers", "2"):
        if attached:
            cloud.end_serve()
            cloud.attach()
        with world.edge() as run:
            run.wait_for_step(world.setting.at)
            for machine in nodes:
                machine.cut_power()
            end_ray(cloud.owner)
            run.check_trains("the head was lost")
            for machine in nodes:
                world.start_node(machine)
            world.start_ray(cloud.owner)
            return Happened([run.finish()], {})


def serve_ended(world: World) -> Happened:
    """`serve` is ended, and `attach` takes its place: it says what is wrong; then the number of workers is changed."""
    cloud = world.cloud
    edges = cloud.home / "authorized_edges"
    with cloud.serving("--workers", "2"), world.edge() as run:
        run.wait_for_step(world.setting.at)
        cloud.end_serve()
        run.wait_for_step(run.steps() + 1)
        cloud.attach()
        run.check_trains("`attach` looked after the cloud")
        good, said = edges.read_text(), len(cloud.said())
        edges.write_text(f"{good}no-such-key\n")
        told = world.wait("a fault that `attach` tells", lambda: "no-such-key" in cloud.said()[said:])
        edges.write_text(good)
        world.wait("the fault's end", lambda: "faults" not in cloud.status())
        cloud.run("scale", "3")
        grown = world.wait("a third worker", lambda: world.serves(2))
        cloud.run("scale", "2")
        world.wait("two workers", lambda: set(cloud.workers()) == {0, 1})
        cloud.end_serve()
        return Happened([run.finish()], {"fault_told_s": round(told, 1), "third_worker_s": round(grown, 1)})


def machine_added(world: World) -> Happened:
    """The cloud is to have a worker more, and Ray's autoscaler adds a machine for it; both are ended again."""
    cloud = world.cloud

    def start(machine: Machine, name: str) -> None:
        world.switch_on(machine)
        world.ray.start(machine, 1, settings={"RAY_CLOUD_INSTANCE_ID": name, "RAY_NODE_TYPE_NAME": WORKER_TYPE})

    with Provisioner(world.ray.head.folder / "autoscaler", world.takers, start) as provisioner:
        with cloud.serving("--workers", "1", "--autoscaled"), world.edge() as run:
            run.wait_for_step(world.setting.at)
            cloud.run("scale", "2")
            added = world.wait("a second worker", lambda: world.serves(1))
            run.check_trains("the machine was added")
            machines = len(provisioner.on)
            cloud.run("scale", "1")
            ended = world.wait("one machine", lambda: len(provisioner.on) == 1)
            done = run.finish()
        world.wait("no machine", lambda: not provisioner.on)
        world.left = provisioner.left
    return Happened([done], {"machines": machines, "added_s": round(added, 1), "ended_s": round(ended, 1)})


CASES: Final[dict[str, Case]] = {
    "two nodes": Case(two_nodes),
    "worker's machine killed": Case(worker_killed, at_most=3.0),
    "stage's machine killed": Case(stage_killed, at_most=12.0),
    "link cut and healed": Case(link_cut),
    "head away for 10 s": Case(partial(head_away, seconds=HEAD_SECONDS), Shape(storage=True)),
    "head away for 90 s": Case(
        partial(head_away, seconds=LONG_HEAD_SECONDS),
        Shape(storage=True, settings=LONG_WAIT),
        seconds=LONG_RUN_SECONDS,
    ),
    "head lost": Case(head_lost),
    "head lost while attached": Case(partial(head_lost, attached=True)),
    "serve ended and attached": Case(serve_ended),
    "machine added and ended": Case(machine_added, Shape(autoscaled=True), seconds=LONG_RUN_SECONDS),
}
"""By the name that the table has for them."""
