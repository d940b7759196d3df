"""Chaos: several tenants train at the same time while whatever can break breaks, and each gets its undisturbed adapter.

Each tenant trains once in peace, then the same again and again. Faults fall in a seeded order
(`isthmus.experiments.rigs.chaos.chaos_plan`), some before the last one is recovered from: a worker is killed at named
points and at any time, fails or stands still; the controller is killed, or Ray's control store, without which the
cluster is started again; the whole cloud is killed and started anew; edges are killed and resumed; connections are cut;
a further tenant sends garbage, floods, holds sessions, reads and writes slowly, and has the others' forward states
evicted, and their steps meanwhile are compared with those in peace. Where the machine can make network namespaces,
edges and cloud have a way between them that loses, delays, doubles and reorders packets, or carries nothing for a
while.

With `soak`, nothing breaks: tenants come and go, and what is measured is the workers' memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from isthmus.backbone.checkpoints.sources import resolve
from isthmus.common.errors import ConfigError, IsthmusError
from isthmus.experiments.harness.bench_flags import names_of
from isthmus.experiments.harness.processes import TaskProcess
from isthmus.experiments.harness.rig_settings import ChaosSettings
from isthmus.experiments.network.delay_relay import Conditions
from isthmus.experiments.network.net_space import NetSpace, missing
from isthmus.experiments.rigs.chaos.chaos_cloud import ChaosCloud
from isthmus.experiments.rigs.chaos.chaos_figures import Fallen, WorkerMemory, figures, resident_bytes
from isthmus.experiments.rigs.chaos.chaos_plan import (
    AT_POINT,
    HIT_NOBODY,
    KINDS,
    NEED_NAMESPACES,
    NETWORK,
    ChaosPlan,
    Fall,
    Span,
    common,
)
from isthmus.experiments.rigs.chaos.chaos_tenant import Tenant
from isthmus.experiments.rigs.fault_points.fault_points import Point, arm, is_armed
from isthmus.experiments.rigs.faults.faults import write_texts
from isthmus.experiments.rigs.histories import read_history, violations
from isthmus.experiments.rigs.hostile_tenants import CONTROL, DEEDS
from isthmus.protocol.enrolment import ConnectionString, parse_size

RECOVERY_SECONDS = 300.0  # a tenant that makes no step for so long does not recover, nor a worker that does not answer
STALL_SECONDS = 3.0
LOOK_SECONDS = 0.02
PATIENCE_SECONDS = 600.0  # that an edge waits for a cloud which is not there, at its start too


def run_chaos(settings: ChaosSettings, folder: Path) -> dict[str, Any]:
    """Train and break; see the module.

    Returns:
        The figures of `isthmus bench chaos`; see `isthmus.experiments.rigs.chaos.chaos_figures.figures`. Beside them,
        `invariants` says how often the workers' histories break each of
        `isthmus.experiments.rigs.histories`, and `violations` where.

    Raises:
        ConfigError: there is no such kind of fault, or none that this machine can make.
        IsthmusError: the cloud did not start, a tenant did not recover, or an edge ended with an error.
    """
    workers = settings.workers or (1 if settings.soak else 2)
    warm_up_s = settings.warm_up_s
    if warm_up_s is None:
        warm_up_s = settings.seconds / 4 if settings.soak else 15.0
    stash_bytes = parse_size(settings.stash_bytes)
    reason = missing()
    asked = names_of(settings.kinds, "kinds", KINDS)
    kinds = tuple(kind for kind in asked if reason is None or kind not in NEED_NAMESPACES)
    if not kinds and not settings.soak:
        raise ConfigError(f"none of the faults asked for can be made here: {reason}")
    plan = ChaosPlan(kinds or KINDS, settings.tenants, settings.seed)
    model = str(resolve(settings.model).folder)  # the namespaces reach neither a hub nor an index
    write_texts(folder / "tickets.jsonl", 4 * settings.steps)
    with ExitStack() as stack:
        space = None
        if reason is None and any(kind in NEED_NAMESPACES for kind in kinds) and not settings.soak:
            space = stack.enter_context(NetSpace(None, Conditions()))
        hostile = not settings.soak and any(kind in DEEDS for kind in kinds)
        cloud = ChaosCloud(settings, workers, model, folder, space, stack, hostile=hostile)
        chaos = _Chaos(settings, cloud, folder, stack)
        chaos.wait_for(lambda: all(tenant.calm for tenant in chaos.tenants), "the undisturbed trainings")
        started = time.monotonic()
        if settings.soak:
            chaos.soak()
        else:
            chaos.disturb(plan)
        chaos.finish()
        found = violations(read_history(folder / "history"))
    return {
        **figures(
            chaos.faults,
            chaos.tenants,
            chaos.calm,
            chaos.deeds,
            chaos.memory,
            workers=workers,
            warm_up_s=warm_up_s,
            soak=settings.soak,
        ),
        "invariants": {name: len(places) for name, places in found.items()},
        "violations": [place for places in found.values() for place in places],
        "network": "network namespaces" if space is not None else reason or "not broken",
        "seconds": round(time.monotonic() - started, 1),
        **{name: value for name, value in asdict(settings).items() if name not in ("kinds", "seconds")},
        **{"workers": workers, "warm_up_s": warm_up_s, "stash_bytes": stash_bytes},
    }


class _Chaos:
    """The tenants, and what breaks them; everything is ended with `stack`."""

    def __init__(self, settings: ChaosSettings, cloud: ChaosCloud, folder: Path, stack: ExitStack) -> None:
        self.faults: list[Fallen] = []
        self.tenants: list[Tenant] = []
        self.calm: list[Span] = []  # when all made steps of their undisturbed trainings
        self.deeds: dict[str, list[Span]] = {}  # when somebody misbehaved, by what they did
        self._settings, self._cloud = settings, cloud
        self._record = folder / "faults.jsonl"
        self.memory = stack.enter_context(WorkerMemory(cloud.pids, cloud.workers))
        for number in range(settings.tenants):
            key = cloud.enroll(f"tenant-{number}")
            task = _task(settings, number, folder / "tickets.jsonl", cloud.where, key)
            self.tenants.append(
                stack.enter_context(Tenant(f"tenant-{number}", task, folder, lambda: cloud.inside("edge")))
            )

    def soak(self) -> None:
        """Let the tenants come and go."""
        self._go()
        self._pause(self._settings.seconds)

    def disturb(self, plan: ChaosPlan) -> None:
        """Break things, until the time is over."""
        self._go()
        self._wait_for_a_step()
        end = time.monotonic() + self._settings.seconds
        pending: list[tuple[Fall, float, list[Tenant]]] = []
        while time.monotonic() < end:
            fall = plan.next()
            if fall.recovered:
                self._recover(pending)
            self._pause(fall.gap_s)
            self._wait_for_a_step()
            fell, hit = self._inject(fall)
            pending.append((fall, fell, hit))
        self._recover(pending)

    def finish(self) -> None:
        """Wait until every tenant has trained to the end of its round, and the cloud is whole again."""
        for tenant in self.tenants:
            tenant.last_round()
        self.wait_for(lambda: all(tenant.done for tenant in self.tenants), "the last rounds")
        self._check_tenants()
        self._all_workers()

    def wait_for(self, happened: Callable[[], bool], what: str, seconds: float | None = None) -> None:
        """Wait for something, and check the tenants meanwhile.

        Raises IsthmusError where it does not happen, or a tenant ended with an error.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while not happened():
            self._check_tenants()
            if deadline is not None and time.monotonic() > deadline:
                raise IsthmusError(f"{what} did not come within {seconds:.0f} s: look into the logs (--keep)")
            time.sleep(LOOK_SECONDS)

    def _check_tenants(self) -> None:
        """Raise the error that has ended one, if there is one."""
        for tenant in self.tenants:
            if tenant.error is not None:
                raise tenant.error

    def _go(self) -> None:
        self.calm.extend(common([tenant.steps for tenant in self.tenants]))
        self.memory.mark()
        for tenant in self.tenants:
            tenant.disturb()

    def _recover(self, pending: list[tuple[Fall, float, list[Tenant]]]) -> None:
        """Wait until whoever was hit has made a step since, and note how long that took."""
        for fall, fell, hit in pending:
            what = f"a step of {len(hit)} tenants after {fall.kind}"
            self.wait_for(partial(_recovered, hit, fell), what, RECOVERY_SECONDS)
            if fall.kind == CONTROL:
                continue
            steps = [moment for tenant in hit if (moment := tenant.recovered_at(fell)) is not None]
            recovery = max(steps) - fell if steps and fall.kind not in HIT_NOBODY else None
            self.faults.append(Fallen(fall.kind, recovery))
            with self._record.open("a") as file:
                file.write(json.dumps(asdict(self.faults[-1])) + "\n")
        pending.clear()

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.wait_for(lambda: time.monotonic() >= end, "the end of a pause")

    def _inject(self, fall: Fall) -> tuple[float, list[Tenant]]:
        """Let a fault fall. Returns when it fell, and the tenants that were at a step then and may have been hit."""
        fell, hit = time.monotonic(), [tenant for tenant in self.tenants if tenant.training]
        match fall.kind:
            case kind if kind in AT_POINT:
                return self._at(AT_POINT[kind], "kill")
            case "worker_failed":
                return self._at(fall.point, "raise")
            case "worker_stalled":
                return self._at(fall.point, f"wait {STALL_SECONDS}")
            case "worker_killed":
                fell = self._kill(lambda: _one_of(self._cloud.pids(), fall.seed), "a worker")
            case "controller_killed":
                fell = self._kill(self._cloud.controller, "the controller")
            case "control_store_killed":
                return self._end_cluster()
            case "cloud_killed":
                self._cloud.cloud.kill()
                fell = time.monotonic()
                self._cloud.start()
            case "edge_killed":
                victims = self.tenants[fall.victim :] + self.tenants[: fall.victim]
                hit = [tenant for tenant in victims if tenant in hit][:1]
                (hit or victims)[0].kill_edge()
            case "connection_cut":
                self._cloud.cut()
                fell = time.monotonic()
            case "silence":
                self._cloud.change_way(Conditions(silence_s=self._settings.silence_s))
                self._pause(self._settings.silence_s)
                self._cloud.change_way(Conditions())
            case kind if kind in NETWORK:
                self._cloud.change_way(Conditions(**{**asdict(NETWORK[kind]), "seed": fall.seed}))
                self._pause(self._settings.bad_s)
                self._cloud.change_way(Conditions())
            case deed if self._cloud.hostile is not None:
                return self._misbehave(deed, self._cloud.hostile)
        return fell, hit

    def _kill(self, find: Callable[[], int | None], what: str) -> float:
        """SIGKILL to a process, once it is found; returns when it died."""
        killed: list[float] = []

        def kill() -> bool:
            pid = find()
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(time.monotonic())
            return bool(killed)

        self.wait_for(kill, what, RECOVERY_SECONDS)
        return killed[0]

    def _end_cluster(self) -> tuple[float, list[Tenant]]:
        """SIGKILL to Ray's control store, and wait for the end of the workers, which work on at first."""
        workers = self._all_workers()
        self._wait_for_a_step()
        hit = [tenant for tenant in self.tenants if tenant.training]
        self._kill(self._cloud.cloud.control_store, "Ray's control store")
        self.wait_for(lambda: not any(map(resident_bytes, workers)), "the workers' end", RECOVERY_SECONDS)
        return time.monotonic(), hit

    def _misbehave(self, deed: str, hostile: TaskProcess) -> tuple[float, list[Tenant]]:
        """Have the hostile tenant do something in a whole cloud, while all others train, and not all to their end."""
        self._all_workers()
        self.wait_for(
            lambda: all(tenant.training for tenant in self.tenants) and any(tenant.early for tenant in self.tenants),
            "a step of all tenants",
            RECOVERY_SECONDS,
        )
        fell, hit = time.monotonic(), [tenant for tenant in self.tenants if tenant.training]
        hostile.ask([deed, self._settings.bad_s])
        self.deeds.setdefault(deed, []).append((fell, time.monotonic()))
        return fell, hit

    def _at(self, point: Point, instruction: str) -> tuple[float, list[Tenant]]:
        """Arm a point, and wait until a worker has got there."""
        arm(self._cloud.points, point, instruction)
        self.wait_for(lambda: not is_armed(self._cloud.points, point), f"a worker at {point}", RECOVERY_SECONDS)
        return time.monotonic(), [tenant for tenant in self.tenants if tenant.training]

    def _wait_for_a_step(self) -> None:
        self.wait_for(lambda: any(tenant.training for tenant in self.tenants), "a step", RECOVERY_SECONDS)

    def _all_workers(self) -> list[int]:
        """The processes of all workers, once all answer."""
        pids: list[int] = []

        def answer() -> bool:
            pids[:] = self._cloud.pids()
            return len(pids) == self._cloud.workers

        self.wait_for(answer, "an answer of all workers", RECOVERY_SECONDS)
        return pids


def _one_of(processes: Sequence[int], seed: int) -> int | None:
    """Any of them; None of none."""
    return processes[seed % len(processes)] if processes else None


def _recovered(tenants: list[Tenant], fault: float) -> bool:
    """Whether each tenant goes on after a fault."""
    return all(tenant.recovered_at(fault) is not None for tenant in tenants)


def _task(settings: ChaosSettings, number: int, data: Path, cloud: ConnectionString, key: Path) -> dict[str, Any]:
    """The fields of `TrainConfig`, without `out`: three methods, lengths and seeds, in turns, all with dropout."""
    first = settings.edge_layers.split(":")[0]
    ways: tuple[dict[str, Any], ...] = ({}, {"sites": first}, {"method": "dora"})
    return {
        **ways[number % len(ways)],
        "cloud": str(cloud),
        "key": str(key),
        "data": str(data),
        "validation_split": 0.0,
        "steps": settings.steps,
        "batch": settings.batch,
        "max_length": max(32, settings.seq - 16 * (number % len(ways))),
        "learning_rate": 1e-3,
        "dropout": 0.1,
        "seed": number,
        "save_every": settings.save_every,
        "threads": settings.threads,
        "connect_timeout": PATIENCE_SECONDS,
        "give_up_after": PATIENCE_SECONDS,
    }
