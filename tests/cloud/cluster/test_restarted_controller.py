"""A controller that Ray starts again: it finds its workers, and what was asked of it, and does without what is gone."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.cluster.controlled_cloud import Cloud, names, pipeline

from isthmus.cloud.cluster import cluster_controller as controller_module
from isthmus.cloud.cluster.cluster_controller import ANSWER_SECONDS, HEAR_SECONDS, PORT_SECONDS
from isthmus.common.errors import PortInUseError
from isthmus.protocol.enrolment import add_line
from isthmus.protocol.secure.keys import (
    generate_edge,
)

Log = Callable[[], list[dict[str, Any]]]


@pytest.mark.parametrize("what", ["its status", "the model"])
@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_controller_that_ray_restarts_does_without_a_port_that_is_taken_and_then_starts_once_more(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, what: str, is_stopped: bool
) -> None:
    slept, exits, threads = list[float](), list[int](), dict[str, Callable[[], None]]()

    def taken(*_: object) -> str:
        raise PortInUseError(f"the port for {what} is taken")

    def thread(*, target: Callable[[], None], name: str, **_: object) -> Any:
        return SimpleNamespace(start=lambda: threads.setdefault(name, target))

    monkeypatch.setattr(controller_module, "threading", SimpleNamespace(RLock=threading.RLock, Thread=thread))
    monkeypatch.setattr(controller_module.time, "sleep", slept.append)
    monkeypatch.setattr(controller_module, "was_restarted", lambda: True)
    pages = list[object]()
    monkeypatch.setattr(controller_module, "serve_pages", taken if what == "its status" else lambda *_: pages.append(_))
    if what != "its status":
        monkeypatch.setattr(controller_module, "ModelFiles", lambda *_: SimpleNamespace(start=taken))
    controller = cloud.begin()
    state = controller.state()
    assert state["ready"]
    assert state["faults"] == [f"the port for {what} is taken; the controller starts again in 5 minutes"]
    assert len(pages) == (what != "its status")  # a port that is free is used
    assert cloud.worker(0).is_certified
    assert set(threads) == {"ports", "rounds", "starts"}
    monkeypatch.setattr(controller_module, "os", SimpleNamespace(_exit=exits.append))
    if is_stopped:
        assert controller.stop(1.0)
        assert cloud.worker(0).drained == [1.0]
    threads["ports"]()
    assert slept == [PORT_SECONDS]
    assert exits == ([] if is_stopped else [1])


def test_a_controller_that_is_restarted_finds_its_workers_again(cloud: Cloud) -> None:
    cloud.begin()
    cloud.worker(1).pid += 1
    cloud.turn(2)
    before = [cloud.worker(number) for number in range(2)]
    cloud.begin(2)
    assert [cloud.worker(number) for number in range(2)] == before
    assert len(cloud.ray.started) == 2
    state = cloud.controller.state()
    assert (state["ready"], state["places"]) == (True, [worker.place for worker in before])
    assert cloud.controller.status()["restarts"] == 1


def test_a_controller_that_is_restarted_finds_workers_that_there_need_not_be(cloud: Cloud) -> None:
    """Nobody else would renew their certificates, take their tenants from their lists, or end them."""
    cloud.begin(3, least=1, most=4)
    cloud.controller._wanted |= {1, 2, 3}
    cloud.turn(3)
    before = [cloud.worker(number) for number in range(4)]
    cloud.begin(1)
    assert len(cloud.controller.state()["places"]) == 4
    assert [cloud.worker(number) for number in range(4)] == before
    cloud.controller.scale(1, 2)
    cloud.turn(3)
    assert cloud.alive() == [0, 1]


def test_workers_that_an_earlier_cloud_has_left_are_drained(cloud: Cloud) -> None:
    cloud.begin(3, least=4, most=4)
    left = cloud.worker(3)
    cloud.begin(4, least=2, most=3)
    assert cloud.alive() == [0, 1, 2]
    assert left.drained == [cloud.spec.grace]


def test_a_worker_that_an_earlier_controller_has_drained_is_started_anew(cloud: Cloud) -> None:
    """It would count as serving, and take no session for ever."""
    cloud.begin(3)
    drained = cloud.worker(1)
    assert drained.drain(1.0)
    cloud.begin(1)
    assert cloud.controller.state()["waits"] == ["worker 1: the end of a worker from before"]
    cloud.turn(2)
    cloud.clock.now += ANSWER_SECONDS
    cloud.turn(3)
    assert cloud.worker(1) is not drained
    assert cloud.controller.state()["ready"]


def test_workers_that_serve_something_else_are_replaced(cloud: Cloud, log: Log) -> None:
    """Their controller was lost, and the owner serves with other options."""
    cloud.begin(3)
    before = [cloud.worker(number) for number in range(2)]
    other = dataclasses.replace(cloud.spec.worker.worker, plan="3:3")
    cloud.begin(1, worker=dataclasses.replace(cloud.spec.worker, worker=other))
    assert not cloud.controller.state()["ready"]
    assert [each.drained for each in before] == [[cloud.spec.grace]] * 2
    cloud.turn()
    cloud.clock.now += ANSWER_SECONDS
    cloud.turn(3)
    assert [cloud.worker(number).spec.worker.plan for number in range(2)] == ["3:3", "3:3"]
    assert [each.drained for each in before] == [[cloud.spec.grace]] * 2
    assert [line["worker"] for line in log() if line["event"] == "worker_outdated"] == [0, 1]
    assert cloud.controller.state()["ready"]
    beside = dataclasses.replace(other, beside=7)
    cloud.begin(3, worker=dataclasses.replace(cloud.spec.worker, worker=beside))
    assert not cloud.worker(0).drained


def test_a_controller_that_is_restarted_takes_nothing_from_its_workers(cloud: Cloud, tmp_path: Path) -> None:
    """A worker keeps the certificate that is not sent again; a stage that was not known would be sent away."""
    add_line(cloud.owner.folder / "authorized_edges", generate_edge(tmp_path / "id", "alice"))
    pipeline(cloud)
    before = [cloud.worker(number).delivery for number in range(3)]
    sent = [len(cloud.worker(number).deliveries) for number in range(3)]
    cloud.begin(4)
    for number in range(3):
        new = [each for each in cloud.worker(number).deliveries[sent[number] :] if each is not None]
        assert {each.authorized_edges for each in new} == {before[number].authorized_edges}
        assert {each.next_stage for each in new} == {before[number].next_stage}
        assert {each.certificate for each in new} == {""}


def test_a_controller_that_has_not_heard_of_all_takes_no_key_from_a_list(cloud: Cloud) -> None:
    cloud.begin(4, least=3, most=3)
    cloud.actor(2).is_silent = True
    known = names(cloud.worker(0).delivery)
    assert set(known) == {"worker-1", "worker-2"}
    cloud.begin(4)
    assert names(cloud.worker(0).delivery) == known
    cloud.clock.now += HEAR_SECONDS + 1.0
    cloud.turn(2)
    assert names(cloud.worker(0).delivery) == {"worker-1": True}  # it has had its time


def test_a_controller_that_is_restarted_knows_how_many_workers_there_should_be(cloud: Cloud) -> None:
    cloud.begin()
    cloud.controller.scale(3, 5)
    assert (cloud.owner.folder / "cluster-cloud.json").stat().st_mode & 0o777 == 0o600
    assert cloud.begin(2).state()["counts"] == (3, 5)
    assert cloud.alive() == [0, 1, 2]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"least": 3}', '{"least": "x", "most": 5}', '{"least": 5, "most": 3}'),
        *('{"least": 0, "most": 3}', '{"least": 3, "most": 1000}', '{"least": null, "most": 5}'),
    ],
)
def test_a_damaged_count_is_not_used(cloud: Cloud, text: str) -> None:
    path = cloud.owner.folder / "cluster-cloud.json"
    path.write_text(json.dumps({"least": 3, "most": 5}))
    assert cloud.begin(0).state()["counts"] == (3, 5)
    path.write_text(text)
    assert cloud.begin(0).state()["counts"] == (2, 2)


def test_a_pipeline_has_as_many_workers_as_stages_whatever_was_scaled_before(cloud: Cloud) -> None:
    (cloud.owner.folder / "cluster-cloud.json").write_text(json.dumps({"least": 1, "most": 5}))
    pipeline(cloud)
    assert cloud.controller.state()["counts"] == (3, 3)
    assert cloud.alive() == [0, 1, 2]
