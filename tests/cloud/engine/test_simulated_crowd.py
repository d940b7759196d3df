"""Tenants who train on one worker, in simulated time: what each gets, with and without one that floods.

The machine is that of `isthmus bench tenants`: two cores, which the worker's lanes and the tenants' own processes share
evenly. A pass takes a time of its own and one for each token position, and its forward a third of both; a tenant
computes for itself before, between and after its calls. The seconds are such that a pass over all calls gains 1.27 and
0.39 of all work is the tenants', as in some of that command's runs. Memory and the wire take no time.
"""

from __future__ import annotations

import functools
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from isthmus.cloud.engine.requests import Batching, Kind, Share
from isthmus.cloud.engine.scheduler import Scheduler
from isthmus.experiments.serving.tenants_bench import jain
from isthmus.experiments.serving.tenants_crowd import LENGTHS

LANES = 2
FORWARD, BACKWARD = (
    Kind("forward", "backward", "forward", opens=True, anywhere=True),
    Kind("backward", "forward", "backward", closes=True, anywhere=True),
)
PASS_SECONDS, POSITION_SECONDS, OWN_SECONDS = 0.114, 0.0056, 0.0047
STEPS = 12
ROOM = 287.0  # of SmolLM2-135M's span in fp32

Then = Callable[[], object]


@dataclass
class Machine:
    """Cores that everybody who has something to do shares; a worker; the moments at which tenants have begun a step."""

    seed: int
    room: float
    lanes: int = LANES  # and as many cores
    now: float = 0.0
    worked: float = 0.0  # core seconds
    began: dict[str, list[float]] = field(default_factory=dict)
    _tasks: list[tuple[list[float], Then]] = field(default_factory=list)  # seconds left, in a list of one

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)  # noqa: S311  # a simulation
        self._scheduler: Scheduler[Then] = Scheduler(lambda: self.now, Batching(), lambda: self.room, self.lanes)
        self._idle = set(range(self.lanes))

    def compute(self, seconds: float, then: Then) -> None:
        """Take a core for so long, give or take a twentieth."""
        self._tasks.append(([seconds * self._random.uniform(0.95, 1.05)], then))

    def call(self, tenant: str, session: int, positions: int, kind: Kind, then: Then) -> None:
        """Ask the worker."""
        owner = f"{tenant}/{session}".encode()
        self._scheduler.add(then, tenant=tenant, owner=owner, share=Share(), positions=positions, kind=kind)

    def train(self, tenant: str, positions: int) -> None:
        """A tenant's steps, one after the other."""
        own = OWN_SECONDS * positions
        self.began.setdefault(tenant, []).append(self.now)

        def after() -> None:
            self.compute(0.2 * own, lambda: self.train(tenant, positions))

        def between() -> None:
            self.compute(0.6 * own, lambda: self.call(tenant, 0, positions, BACKWARD, after))

        self.compute(0.2 * own, lambda: self.call(tenant, 0, positions, FORWARD, between))

    def flood(self, tenant: str, session: int, positions: int, kinds: Sequence[Kind]) -> None:
        """A session that wants computing all the time: calls of these kinds, again and again."""
        kind, *rest = kinds
        then = lambda: self.flood(tenant, session, positions, [*rest, kind])  # noqa: E731
        self.compute(0.004, lambda: self.call(tenant, session, positions, kind, then))

    def hold(self, tenant: str, session: int, positions: int) -> None:
        """A session that opens something and is silent from then on."""
        self.compute(0.004, lambda: self.call(tenant, session, positions, FORWARD, lambda: None))

    def run(self) -> None:
        """Let time pass until every tenant has made its steps."""
        while min(map(len, self.began.values())) <= STEPS:
            self._begin()
            rate = min(1.0, self.lanes / max(1, len(self._tasks)))
            steps = [left[0] / rate for left, _ in self._tasks]
            if self._idle and (ready := self._scheduler.ready_at()) is not None:
                steps.append(max(ready - self.now, 0.0) + 1e-3)
            passed = min(steps)
            self.now += passed
            self.worked += passed * rate * len(self._tasks)
            for left, _ in self._tasks:
                left[0] -= passed * rate
            done = [task for task in self._tasks if task[0][0] <= 1e-9]
            self._tasks = [task for task in self._tasks if task[0][0] > 1e-9]
            for _, then in done:
                then()

    def _begin(self) -> None:
        for lane in sorted(self._idle):
            batch = self._scheduler.next(anywhere=lane > 0)
            if not batch:
                continue
            assert batch[0].kind is not None
            seconds = PASS_SECONDS + POSITION_SECONDS * sum(job.positions for job in batch)
            self._idle.remove(lane)

            def end(lane: int = lane, batch: list = batch, since: float = self.now) -> None:  # type: ignore[type-arg]
                self._idle.add(lane)
                self._scheduler.finished(batch, self.now - since)
                for job in batch:
                    job.work()

            self.compute(seconds / 3 * (1 if batch[0].kind is FORWARD else 2), end)

    def steps(self) -> list[float]:
        """Seconds of each counted step of the tenants, the shortest first."""
        pairs = ((a, b) for began in self.began.values() for a, b in pairwise(began[: STEPS + 1]))
        return sorted(b - a for a, b in pairs)


def crowd(seed: int, room: float, sessions: int = 0, kinds: Sequence[Kind] = (), held: int = 0) -> Machine:
    """Eight tenants, the first of which, where it has `sessions` that flood, wants all it can get with them.

    It may hold as much as it can get in memory, too, with so many sessions more.
    """
    machine = Machine(seed, room)
    for number, length in enumerate(LENGTHS):
        if number or not sessions:
            machine.train(f"tenant {number}", round(64 * length))
    for session in range(sessions):
        machine.flood("tenant 0", session, 64, kinds)
    for session in range(sessions, sessions + held):
        machine.hold("tenant 0", session, 64)
    machine.run()
    return machine


@functools.cache
def calm_steps(room: float) -> list[float]:
    return [step for seed in range(4) for step in crowd(seed, room).steps()]


@pytest.mark.parametrize(
    ("sessions", "kinds", "held"),
    [
        pytest.param(10, [FORWARD, BACKWARD], 0, id="ten sessions"),
        pytest.param(10, [BACKWARD], 0, id="ten that only replay"),
        pytest.param(10, [FORWARD], 0, id="ten that close nothing"),
        pytest.param(1, [FORWARD], 0, id="one that closes nothing"),
        pytest.param(1, [BACKWARD], 9, id="one that replays and nine that hold what they have opened"),
    ],
)
@pytest.mark.parametrize("room", [ROOM, math.inf])
def test_whoever_floods_slows_the_others_down_little(
    room: float, sessions: int, kinds: Sequence[Kind], held: int
) -> None:
    calm = calm_steps(room)
    flooded = [step for seed in range(4) for step in crowd(seed, room, sessions, kinds, held).steps()]
    assert sum(flooded) / len(flooded) <= 1.05 * sum(calm) / len(calm)
    assert sorted(flooded)[-len(flooded) // 100] <= 1.2 * sorted(calm)[-len(calm) // 100]


@pytest.mark.parametrize("others", [1, 2, 3])
@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param([FORWARD, BACKWARD], id="that trains"),
        pytest.param([FORWARD], id="that closes nothing"),
        pytest.param([BACKWARD], id="that only replays"),
    ],
)
def test_with_one_lane_a_flood_costs_little_more_than_a_further_tenant(kinds: Sequence[Kind], others: int) -> None:
    def mean_step(sessions: int, kinds: Sequence[Kind]) -> float:
        machine = Machine(0, ROOM, lanes=1)
        for number in range(others):
            machine.train(f"tenant {number}", 64)
        for session in range(sessions):
            machine.flood("flood", session, 64, kinds)
        machine.run()
        return statistics.mean(machine.steps())

    assert mean_step(10, kinds) <= 1.1 * mean_step(1, [FORWARD, BACKWARD])


@pytest.mark.parametrize("room", [ROOM, math.inf])
def test_a_crowd_has_nearly_all_that_is_possible(room: float) -> None:
    positions = 64 * sum(LENGTHS)
    best = (OWN_SECONDS * positions + PASS_SECONDS + POSITION_SECONDS * positions) / LANES  # all calls in one pass
    efficiency, fairness = [], []
    for seed in range(4):
        machine = crowd(seed, room)
        rounds = sum((len(began) - 1) * length for began, length in zip(machine.began.values(), LENGTHS, strict=True))
        efficiency.append(best * rounds / len(LENGTHS) / machine.now)
        fairness.append(jain([len(each) for each in machine.began.values()]))
        assert machine.worked / machine.now >= 0.95 * LANES
    assert statistics.mean(efficiency) >= (0.93 if room == ROOM else 0.95)
    assert min(efficiency) > (0.925 if room == ROOM else 0.93)
    assert min(fairness) > 0.99
