"""How the controller of a cloud on a cluster adds, drains and ends workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from support.cluster.controlled_cloud import Cloud, names, pipeline
from support.cluster.fake_actors import FakeActor

from isthmus.cloud.cluster import cluster_controller as controller_module
from isthmus.cloud.cluster.cluster_controller import ANSWER_SECONDS, PLACE_SECONDS, RETRY_SECONDS
from isthmus.cloud.control.autoscaler import GROW_SECONDS, PAUSE_SECONDS, SHRINK_SECONDS
from isthmus.common.errors import UnreachableError
from isthmus.protocol.secure.keys import (
    make_issuer,
)

Log = Callable[[], list[dict[str, Any]]]


# Scaling --------------------------------------------------------------------------------------------------------------


def test_fewer_workers_are_drained_first_and_never_those_that_there_are_at_least(cloud: Cloud) -> None:
    cloud.begin(3, least=4, most=4, grace=7.5)
    for number in range(4):
        cloud.actor(number).is_silent = number == 3
    cloud.controller.scale(2, 2)
    cloud.turn()
    drained = [number for number in range(4) if ("drain", (7.5,)) in cloud.actor(number).calls]
    assert drained == [2, 3]
    cloud.turn()
    assert cloud.actor(2).was_killed  # its calls are answered
    assert not cloud.actor(3).was_killed  # its are not yet
    assert cloud.alive() == [0, 1, 3]
    cloud.actor(3).is_silent = False
    cloud.turn(2)
    assert cloud.alive() == [0, 1]
    cloud.turn(3)
    assert cloud.alive() == [0, 1]
    assert [("drain", (7.5,)) in cloud.actor(number).calls for number in range(2)] == [False, False]
    assert names(cloud.worker(0).delivery) == {"worker-1": True}


def test_more_workers_are_started_and_one_that_is_being_drained_is_started_again(cloud: Cloud) -> None:
    cloud.begin(3)
    cloud.controller.scale(1, 1)
    cloud.actor(1).is_silent = True
    cloud.turn()
    ending = cloud.actor(1)
    cloud.controller.scale(3, 3)
    cloud.turn(2)
    assert not ending.was_killed
    assert cloud.alive() == [0, 1, 2]
    ending.is_silent = False
    cloud.turn(2)
    cloud.clock.now += ANSWER_SECONDS
    cloud.turn(3)
    assert ending.was_killed
    assert cloud.actor(1) is not ending
    assert cloud.alive() == [0, 1, 2]
    assert cloud.controller.state()["ready"]


def test_a_worker_is_added_while_calls_are_overdue_and_ended_when_none_waits(cloud: Cloud) -> None:
    cloud.begin(3, least=1, most=3)
    assert cloud.alive() == [0]
    cloud.worker(0).overdue = cloud.worker(0).waiting = 5
    cloud.turn()
    cloud.clock.now += GROW_SECONDS - 0.1
    cloud.turn()
    assert cloud.alive() == [0]
    cloud.clock.now += 0.2
    cloud.turn(4)
    assert cloud.alive() == [0, 1]
    cloud.worker(0).overdue = cloud.worker(0).waiting = 0
    cloud.worker(0).sessions, cloud.worker(1).sessions = 0, 9  # the first one is never ended, not even idle
    cloud.turn()
    cloud.clock.now += PAUSE_SECONDS + SHRINK_SECONDS
    cloud.turn(3)
    assert cloud.alive() == [0]
    assert cloud.worker(1).drained == [cloud.spec.grace]
    for _ in range(4):
        cloud.clock.now += PAUSE_SECONDS + SHRINK_SECONDS
        cloud.turn()
    assert cloud.alive() == [0]


def test_no_further_worker_is_added_while_one_is_still_being_started(cloud: Cloud) -> None:
    cloud.prepare = lambda worker: setattr(worker, "waits", "its model" if worker.number == 1 else "")
    cloud.begin(3, least=1, most=3)
    cloud.worker(0).overdue = cloud.worker(0).waiting = 5
    for _ in range(6):
        cloud.turn()
        cloud.clock.now += GROW_SECONDS + PAUSE_SECONDS
    assert cloud.alive() == [0, 1]
    cloud.worker(1).waits = ""
    cloud.worker(1).overdue = 5
    for _ in range(6):
        cloud.turn()
        cloud.clock.now += GROW_SECONDS + PAUSE_SECONDS
    assert cloud.alive() == [0, 1, 2]


def test_a_worker_that_finds_no_place_is_given_up_and_never_one_that_there_is_at_least(cloud: Cloud) -> None:
    cloud.begin(3, least=1, most=2)
    cloud.controller._wanted.add(1)
    cloud.controller._start_missing()
    cloud.actor(1).is_silent = True  # Ray looks for a node with room
    cloud.turn(2)
    cloud.clock.now += PLACE_SECONDS
    cloud.turn()
    assert cloud.alive() == [0, 1]
    cloud.clock.now += 1.0
    cloud.turn()
    assert cloud.alive() == [0]
    cloud.actor(0).is_gone = True
    cloud.turn(2)
    cloud.actor(0).is_silent = True
    cloud.clock.now += 2 * PLACE_SECONDS
    cloud.turn(3)
    assert cloud.alive() == [0]


def test_a_worker_that_falls_after_hours_has_its_time_to_come_back(cloud: Cloud) -> None:
    cloud.begin(3, least=1, most=2)
    cloud.worker(0).waiting = 1  # so that the other one is not too many
    cloud.controller._wanted.add(1)
    cloud.controller._start_missing()
    cloud.actor(1).is_silent = True  # Ray looks for a node with room
    cloud.turn()
    cloud.actor(1).is_silent = False
    cloud.turn(3)
    cloud.clock.now += 10 * PLACE_SECONDS
    cloud.turn(2)
    cloud.worker(1).failure = "its GPU is gone"
    cloud.turn()
    cloud.clock.now += RETRY_SECONDS
    cloud.turn(3)
    assert cloud.alive() == [0, 1]
    assert not cloud.worker(1).failure


def test_the_fault_of_a_worker_that_is_not_wanted_any_more_goes_with_it(cloud: Cloud) -> None:
    cloud.prepare = lambda worker: setattr(worker, "failure", "no GPU" if worker.number == 2 else "")
    cloud.begin(3, least=3, most=3)
    assert len(cloud.faults()) == 1
    cloud.controller.scale(2, 2)
    cloud.turn(2)
    assert cloud.faults() == []
    assert cloud.controller.state()["ready"]


def test_the_fault_of_a_worker_that_is_drained_goes_with_it(cloud: Cloud) -> None:
    cloud.begin(3, least=3, most=3)
    make_issuer(cloud.owner.folder, 1, lambda: time.time() - 2 * 86_400)
    cloud.worker(2).renews = True
    cloud.turn(2)
    assert len(cloud.faults()) == 1
    cloud.controller.scale(2, 2)
    cloud.turn(3)
    assert cloud.alive() == [0, 1]
    assert cloud.faults() == []


# The end --------------------------------------------------------------------------------------------------------------


def test_a_cloud_ends_once_its_calls_are_answered(cloud: Cloud) -> None:
    cloud.begin()
    cloud.controller.scale(2, 2)
    assert cloud.controller.stop(4.0)
    assert cloud.alive() == []
    assert [cloud.worker(number).drained for number in range(2)] == [[4.0], [4.0]]
    assert not (cloud.owner.folder / "cluster-cloud.json").exists()
    cloud.controller._run()  # has nothing to do any more
    assert cloud.alive() == []


def test_a_cloud_that_cannot_be_stopped_now_goes_on(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's head is away: the owner gives the command again."""
    cloud.begin()

    def away(name_of: Callable[[int], str]) -> dict[int, FakeActor]:
        raise UnreachableError("Ray does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(controller_module, "named_actors", away)
        with pytest.raises(UnreachableError):
            cloud.controller.stop(1.0)
    cloud.actor(1).is_gone = True
    cloud.turn(3)
    assert cloud.alive() == [0, 1]
    assert cloud.controller.stop(1.0)
    assert cloud.alive() == []


def test_a_worker_that_is_just_being_started_ends_with_its_cloud(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """A detached actor that nobody ended would hold its port, and serve the next cloud of that name as it did here."""
    cloud.begin()
    cloud.controller.scale(3, 3)

    def started(*arguments: Any, **options: Any) -> FakeActor:
        assert cloud.controller.stop(1.0)  # the owner's command comes on another thread
        return cloud.ray.start_anywhere(*arguments, **options)

    monkeypatch.setattr(controller_module, "start_anywhere", started)
    cloud.turn()
    assert [name for name, _ in cloud.ray.started][-1] == "isthmus-cloud-worker-2"
    assert cloud.alive() == []


@pytest.mark.parametrize("why", ["unanswered", "silent", "gone"])
def test_a_cloud_whose_calls_are_not_answered_ends_all_the_same_and_says_so(cloud: Cloud, why: str) -> None:
    cloud.begin()
    if why == "unanswered":
        cloud.worker(1).drains = False
    else:
        setattr(cloud.actor(1), f"is_{why}", True)
    assert not cloud.controller.stop(4.0)
    assert cloud.actor(0).was_killed
    assert cloud.actor(1).was_killed


def test_a_pipelines_stages_are_drained_from_the_first_to_the_last(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline(cloud)
    order: list[tuple[str, int]] = []
    for number in range(3):
        worker = cloud.worker(number)
        monkeypatch.setattr(worker, "drain", lambda grace, n=number: order.append(("drain", n)) or True)
        monkeypatch.setattr(cloud.actor(number), "kill", lambda n=number: order.append(("kill", n)))
    assert cloud.controller.stop(1.0)
    assert order == [(what, number) for what in ("drain", "kill") for number in range(3)]
