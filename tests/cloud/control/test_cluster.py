"""A cloud's actors, with a cluster of actors that answer at once in the place of Ray's."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from isthmus.cloud.control import cluster
from isthmus.cloud.control.autoscaler import Change
from isthmus.cloud.control.cluster import ControlStoreLostError, Serving, State
from isthmus.cloud.control.ray_cluster import ActorGoneError, NoAnswerError
from isthmus.cloud.control.worker import WorkerSpec
from isthmus.cloud.engine.freed_memory import wiping
from isthmus.common.errors import ConfigError, IsthmusError

SPEC = WorkerSpec("", "tiny", "2:2", "fp32", "", "", "127.0.0.1:0", 1, 1, 1, "")
AWAY, GONE = NoAnswerError("it is being restarted"), ActorGoneError("the actor died")


class FakeAnswer:
    def __init__(self, value: Any, ready: bool = True) -> None:
        self.value, self.ready = value, ready
        self.waited: float | None = None

    def is_ready(self) -> bool:
        return self.ready

    def result(self, seconds: float | None = None) -> Any:
        self.waited = seconds
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


class FakeActor:
    """Notes what it is asked, and answers the next one of `answers`, or with its last one again and again."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name
        self.answers: dict[str, list[Any]] = {"port": [7444], "drain": [True], "ready": [1], "change": [None]}
        self.asked: list[FakeAnswer] = []

    def ask(self, method: str, *_: object) -> FakeAnswer:
        self.log.append(f"{self.name}.{method}")
        left = self.answers[method]
        value = left.pop(0) if len(left) > 1 else left[0]
        self.asked.append(value if isinstance(value, FakeAnswer) else FakeAnswer(value))
        return self.asked[-1]

    def kill(self) -> None:
        self.log.append(f"kill {self.name}")


class FakeCluster:
    has_gpus = False

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.actors: dict[str, FakeActor] = {}
        self.environments: dict[str, Mapping[str, str]] = {}
        self.control_store = ("127.0.0.1", 1)

    def start(
        self, _kind: type, _argument: object, *, name: str, environment: Mapping[str, str], worker: int | None = None
    ) -> FakeActor:
        short = "controller" if worker is None else f"worker-{worker}"
        self.environments[short] = environment
        return self.actors.setdefault(short, FakeActor(self.log, short))

    def reserve_gpus(self, workers: list[int], seconds: float = 0.0) -> None:
        self.log.append(f"reserve {workers}")

    def release_gpu(self, worker: int) -> None:
        self.log.append(f"release {worker}")

    def shutdown(self) -> None:
        self.log.append("shutdown")


Start = Callable[..., Serving]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    made = FakeCluster([])
    monkeypatch.setattr(cluster, "RayCluster", lambda *_: made)
    monkeypatch.setattr(cluster, "log_to", lambda _: None)
    return made


@pytest.fixture
def start(fake: FakeCluster, tmp_path: Path) -> Start:
    """Starts a cloud of one worker, which may have more; what that takes is not noted."""

    def serving(most: int = 1, **changes: Any) -> Serving:
        specs = [dataclasses.replace(SPEC, number=number, **changes) for number in range(most)]
        made = Serving(specs, tmp_path, tmp_path / "ray", least=1, metrics="", grace=1.0)
        fake.log.clear()
        return made

    return serving


def test_each_phase_of_a_start_is_said(fake: FakeCluster, tmp_path: Path) -> None:
    specs = [dataclasses.replace(SPEC, number=number) for number in range(3)]
    said: list[str] = []
    Serving(specs, tmp_path, tmp_path / "ray", least=2, metrics="", grace=1.0, say=said.append)
    assert said == [
        "starting Ray",
        "starting 2 workers, each of which loads its layers",
        "worker 1 of 2 is ready",
        "worker 2 of 2 is ready",
    ]


def test_only_workers_that_must_wipe_have_the_environment_for_it(fake: FakeCluster, start: Start) -> None:
    wiped = wiping(os.environ)
    for wipe in (True, False):
        start(wipe_freed=wipe)
        assert (wiped.items() <= fake.environments["worker-0"].items()) == wipe
        assert not wiped.keys() & fake.environments["controller"].keys()


def test_a_worker_is_started_and_drained_as_the_controller_says(fake: FakeCluster, start: Start) -> None:
    serving = start(most=2)
    fake.actors["controller"].answers["change"] = [Change(1, start=True), None, Change(1, start=False), None]
    for _ in range(5):
        serving._scale()
    asked = ["controller.change"]
    started, ended = [*asked, "worker-1.port", *asked], [*asked, "worker-1.drain", "kill worker-1", "release 1", *asked]
    assert fake.log == [*started, *ended, *asked]
    assert list(serving._workers) == [0]


def test_a_change_that_is_made_already_is_left_alone(fake: FakeCluster, start: Start) -> None:
    serving = start(most=2)
    fake.actors["controller"].answers["change"] = [Change(0, start=True), Change(1, start=False)]
    serving._scale()
    serving._scale()
    assert fake.log == ["controller.change"] * 2


def test_a_worker_that_dies_while_it_loads_is_asked_again(fake: FakeCluster, start: Start) -> None:
    serving = start(most=2)
    fake.actors["worker-1"] = FakeActor(fake.log, "worker-1")
    fake.actors["worker-1"].answers["port"] = [AWAY, 7445]
    serving._add(1)
    serving._scale()
    assert serving._workers[1].state == State.STARTING
    serving._scale()
    assert serving._workers[1].state == State.RUNNING
    assert fake.log == ["worker-1.port", "worker-1.port", "controller.change"]


@pytest.mark.parametrize("error", [ConfigError("it does not fit"), GONE])
def test_a_worker_that_cannot_start_later_is_ended(fake: FakeCluster, start: Start, error: Exception) -> None:
    serving = start(most=2)
    fake.actors["worker-1"] = FakeActor(fake.log, "worker-1")
    fake.actors["worker-1"].answers["port"] = [error]
    serving._add(1)
    serving._scale()
    assert list(serving._workers) == [0]
    assert fake.log[1:] == ["kill worker-1", "release 1", "controller.change"]


def test_a_worker_that_still_loads_is_neither_asked_nor_drained(fake: FakeCluster, start: Start) -> None:
    serving = start()
    serving._workers[0].state, serving._workers[0].answer = State.STARTING, FakeAnswer(1, ready=False)
    fake.actors["worker-0"].answers = {"port": [GONE], "drain": [False]}
    assert not serving.is_dead()
    assert serving.drain(1.0) is True


def test_a_worker_that_has_loaded_is_drained_before_anybody_has_looked(fake: FakeCluster, start: Start) -> None:
    serving = start()
    serving._workers[0].state = State.STARTING
    fake.actors["worker-0"].answers["drain"] = [GONE]
    assert serving.drain(1.0) is False  # it was asked, and its death is a call unanswered


@pytest.mark.parametrize("error", [GONE, AWAY])
def test_a_worker_that_is_dead_or_stuck_at_the_drain_is_no_error(
    fake: FakeCluster, start: Start, error: Exception
) -> None:
    serving = start()
    fake.actors["worker-0"].answers["drain"] = [error]
    assert serving.drain(1.0) is False
    waited = fake.actors["worker-0"].asked[-1].waited
    assert waited is not None
    assert waited > 1.0  # a drain that takes all of its grace is answered


def test_only_a_worker_that_is_gone_for_good_is_dead(fake: FakeCluster, start: Start) -> None:
    serving = start()
    for answer, dead in ((7444, False), (AWAY, False), (GONE, True)):
        fake.actors["worker-0"].answers["port"] = [answer]
        assert serving.is_dead() is dead


def test_the_stages_of_a_pipeline_are_drained_one_after_the_other(fake: FakeCluster, start: Start) -> None:
    serving = start(most=2)
    serving._add(1)
    serving._specs = [SPEC, dataclasses.replace(SPEC, number=1, edges="stage")]
    fake.log.clear()
    waiting = fake.actors["worker-0"]
    waiting.answers["drain"] = [ConfigError("no call was answered")]
    with pytest.raises(ConfigError):
        serving.drain(1.0)
    assert fake.log == ["worker-0.drain"]
    waiting.answers["drain"] = [True]
    assert serving.drain(1.0) is True
    assert fake.log[1:] == ["worker-0.drain", "worker-1.drain"]


def test_a_worker_that_cannot_start_for_an_unknown_reason_is_no_mistake_of_the_configuration(
    fake: FakeCluster, start: Start
) -> None:
    fake.actors["worker-0"] = FakeActor(fake.log, "worker-0")
    fake.actors["worker-0"].answers["port"] = [GONE]
    with pytest.raises(IsthmusError, match="the actor died") as failure:
        start()
    assert failure.value.exit_code == 1


def test_a_machine_on_which_ray_finds_no_gpu_is_told_before_workers_are_started(
    fake: FakeCluster, start: Start
) -> None:
    with pytest.raises(ConfigError, match=r"^--device cuda needs a GPU that torch finds, and it finds none"):
        start(device="cuda")
    assert fake.log == []
    fake.has_gpus = True
    start(device="cuda")


def test_a_control_store_that_is_gone_is_told_after_a_few_looks(fake: FakeCluster, start: Start) -> None:
    serving = start()
    with socket.socket() as store:
        store.bind(("127.0.0.1", 0))
        store.listen()
        fake.control_store = store.getsockname()
        for _ in range(5):
            serving.tend()
    serving.tend()
    serving.tend()
    with pytest.raises(ControlStoreLostError):
        serving.tend()
    serving.restart()
    assert fake.log == ["shutdown", "worker-0.port", "controller.ready"]
