"""The controller of a cloud on a cluster, without Ray: what it starts, starts again, and tells its operator."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.cluster.controlled_cloud import Cloud, names, pipeline

from isthmus.cloud.cluster import cluster_controller as controller_module
from isthmus.cloud.cluster.cluster_controller import ANSWER_SECONDS, HEAR_SECONDS, PORT_SECONDS, RETRY_SECONDS
from isthmus.cloud.cluster.cluster_spec import Claims
from isthmus.cloud.control import controller as pages
from isthmus.cloud.nodes.deliveries import Delivery
from isthmus.cloud.telemetry.metrics import serve_metrics
from isthmus.common.errors import PortInUseError
from isthmus.protocol.enrolment import add_line
from isthmus.protocol.secure.certificates import WorkerCertificate
from isthmus.protocol.secure.keys import (
    generate_edge,
    load_issuer,
)

Log = Callable[[], list[dict[str, Any]]]


# Starting -------------------------------------------------------------------------------------------------------------


def test_workers_are_started_certified_and_ready_in_a_few_rounds(cloud: Cloud, log: Log) -> None:
    controller = cloud.begin(0, claims=Claims(1 << 30, 1, ({"zone": "a"},)))
    state = controller.state()
    assert not state["ready"]
    assert state["waits"] == ["worker 0: a node with room for it", "worker 1: a node with room for it"]
    cloud.turn()
    assert controller.state()["waits"] == ["worker 0: its certificate", "worker 1: its certificate"]
    cloud.turn()
    state = controller.state()
    assert (state["ready"], state["waits"], state["faults"]) == (True, [], [])
    assert state["places"] == ["10.0.0.1:7443", "10.0.0.2:7444"]
    assert state["counts"] == (2, 2)
    assert state["spec"] == cloud.spec
    assert cloud.ray.started == [(f"isthmus-cloud-worker-{number}", cloud.spec.claims) for number in range(2)]
    assert list(cloud.ray.environments.values()) == [{"OMP_NUM_THREADS": "1"}] * 2
    certificate = WorkerCertificate.from_json(cloud.worker(1).delivery.certificate)
    certificate.verify(time.time())
    assert certificate.worker == cloud.worker(1).raw
    assert certificate.root == load_issuer(cloud.owner.folder).root
    assert [line["worker"] for line in log() if line["event"] == "certificate_issued"] == [0, 1]


def test_a_cloud_is_ready_once_as_many_serve_as_there_are_at_least(cloud: Cloud) -> None:
    cloud.prepare = lambda worker: setattr(worker, "waits", "its model" if worker.number == 1 else "")
    controller = cloud.begin()
    state = controller.state()
    assert (state["ready"], state["waits"]) == (False, ["worker 1: its model"])
    assert state["places"] == ["10.0.0.1:7443"]
    cloud.worker(1).waits = ""
    cloud.turn()
    assert controller.state()["ready"]


def test_a_controller_that_cannot_serve_its_status_says_so(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "REBINDS", 1)
    other = serve_metrics("127.0.0.1", 0, bytes, dict)
    try:
        taken = f"127.0.0.1:{other.server_port}"
        with pytest.raises(PortInUseError, match="choose another --metrics"):
            cloud.begin(metrics=taken).state()
    finally:
        other.shutdown()
        other.server_close()
    assert not cloud.begin(0, metrics="").state()["ready"]


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
    if what == "its status":
        monkeypatch.setattr(controller_module, "serve_pages", taken)
    else:
        monkeypatch.setattr(controller_module, "ModelFiles", lambda *_: SimpleNamespace(start=taken))
    controller = cloud.begin()
    state = controller.state()
    assert state["ready"]
    assert state["faults"] == [f"the port for {what} is taken; it is tried again in 5 minutes at most"]
    assert cloud.worker(0).is_certified
    assert set(threads) == {"ports", "rounds", "starts"}
    monkeypatch.setattr(controller_module, "os", SimpleNamespace(_exit=exits.append))
    if is_stopped:
        assert controller.stop(1.0)
        assert cloud.worker(0).drained == [1.0]
    threads["ports"]()
    assert slept == [PORT_SECONDS]
    assert exits == ([] if is_stopped else [1])


def test_a_step_that_fails_is_logged_and_the_others_go_on(cloud: Cloud, log: Log) -> None:
    controller = cloud.begin(0)
    turns, others = itertools.count(1), itertools.count(1)

    def rounds() -> None:
        if (turn := next(turns)) == 1:
            raise RuntimeError("Ray is away")
        if turn == 3:
            controller.stop(0.0)

    def other() -> None:
        next(others)

    controller._run(rounds, other)
    assert (next(turns), next(others)) == (4, 4)
    failed = [(line["step"], line["error"]) for line in log() if line["event"] == "round_failed"]
    assert failed == [("rounds", "RuntimeError: Ray is away")]


def test_workers_are_asked_while_none_can_be_started(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray waits a minute for its head, and workers' certificates and lists cannot."""
    controller = cloud.begin()
    asked, is_away, is_back = len(cloud.actor(0).calls), threading.Event(), threading.Event()

    def away(*arguments: Any, **options: Any) -> Any:
        is_away.set()
        is_back.wait()
        return cloud.ray.start_anywhere(*arguments, **options)

    monkeypatch.setattr(controller_module, "start_anywhere", away)
    cloud.actor(1).is_gone = True
    controller._round()
    starts = threading.Thread(target=controller._start_missing, daemon=True)
    starts.start()
    assert is_away.wait(60.0)
    rounds = threading.Thread(target=controller._round, daemon=True)
    rounds.start()
    rounds.join(60.0)
    assert not rounds.is_alive()
    assert len(cloud.actor(0).calls) > asked + 1
    is_back.set()
    starts.join()


def test_rounds_and_starts_have_threads_of_their_own(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[set[str]] = []

    def thread(*, args: tuple[Callable[[], None], ...], **_: object) -> Any:
        return SimpleNamespace(start=lambda: threads.append({step.__name__ for step in args}))

    monkeypatch.setattr(controller_module, "threading", SimpleNamespace(RLock=threading.RLock, Thread=thread))
    cloud.begin(0)
    assert [("_round" in each, "_start_missing" in each) for each in threads] == [(True, False), (False, True)]


# Workers that go ------------------------------------------------------------------------------------------------------


def test_a_worker_that_is_gone_for_good_is_started_again(cloud: Cloud, log: Log) -> None:
    cloud.begin()
    before = cloud.worker(1)
    cloud.actor(1).is_gone = True
    cloud.turn(2)
    assert "worker_gone" in {line["event"] for line in log()}
    assert cloud.worker(1) is not before
    assert [name for name, _ in cloud.ray.started].count("isthmus-cloud-worker-1") == 2
    assert cloud.worker(0) is not None
    assert [name for name, _ in cloud.ray.started].count("isthmus-cloud-worker-0") == 1
    cloud.turn(2)
    assert cloud.worker(1).is_certified
    assert cloud.controller.state()["ready"]


def test_a_silent_worker_is_asked_once_and_not_started_again(cloud: Cloud) -> None:
    cloud.begin()
    actor = cloud.actor(1)
    actor.is_silent = True
    before = len(actor.calls)
    cloud.turn(5)
    assert len(actor.calls) == before + 1
    assert cloud.actor(1) is actor
    assert not cloud.controller.state()["ready"]


def test_a_worker_that_has_failed_is_ended_and_started_again_after_a_pause(cloud: Cloud) -> None:
    cloud.prepare = lambda worker: setattr(worker, "failure", "no GPU" if worker.number == 1 else "")
    cloud.begin(2)
    failed = cloud.actor(1)
    assert failed.was_killed
    assert cloud.faults() == ["worker 1 on gpu-1 (10.0.0.2) cannot serve: no GPU"]
    assert cloud.controller.state()["waits"] == ["worker 1: worker 1 on gpu-1 (10.0.0.2) cannot serve: no GPU"]
    cloud.prepare = lambda worker: None
    cloud.clock.now = RETRY_SECONDS - 0.1
    cloud.turn(3)
    assert cloud.actor(1) is failed
    assert cloud.alive() == [0]
    cloud.clock.now = RETRY_SECONDS
    cloud.turn(3)
    assert cloud.actor(1) is not failed
    assert cloud.alive() == [0, 1]
    assert cloud.faults() == []
    assert cloud.controller.state()["ready"]


def test_a_worker_that_cannot_even_be_made_is_told_of_and_tried_again_later(cloud: Cloud) -> None:
    cloud.begin(0)
    cloud.controller._start_missing()
    cloud.actor(1).is_gone = True  # its class cannot be imported on that node, say
    cloud.turn(3)
    (fault,) = cloud.faults()
    assert fault.startswith("worker 1 could not be started: The actor is dead")
    assert [name for name, _ in cloud.ray.started].count("isthmus-cloud-worker-1") == 1
    cloud.clock.now += RETRY_SECONDS
    cloud.turn(3)
    assert cloud.faults() == []
    assert cloud.controller.state()["ready"]


def test_restarts_are_counted_and_told_to_the_worker(cloud: Cloud) -> None:
    cloud.begin()
    cloud.worker(1).pid += 1  # Ray has restarted it
    cloud.turn(2)
    assert cloud.worker(1).restarts == 1
    assert cloud.worker(0).restarts == 0
    assert cloud.controller.status()["restarts"] == 1


# A controller that is restarted ---------------------------------------------------------------------------------------


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


# For the operator -----------------------------------------------------------------------------------------------------


def test_the_status_names_the_nodes_and_what_is_wrong(cloud: Cloud) -> None:
    cloud.prepare = lambda worker: setattr(worker, "waits", "its model" if worker.number == 1 else "")
    cloud.begin()
    status = cloud.controller.status()
    assert [(worker["state"], worker["node"]) for worker in status["workers"]] == [
        ("serving", "gpu-0 (10.0.0.1)"),
        ("starting", "gpu-1 (10.0.0.2)"),
    ]
    assert (status["state"], status["model"]) == ("serving", "tiny")
    assert "faults" not in status
    cloud.prepare = lambda worker: setattr(worker, "failure", "no GPU")
    cloud.actor(1).is_gone = True
    cloud.turn(2)
    assert cloud.controller.status()["faults"] == ["worker 1 on gpu-1 (10.0.0.2) cannot serve: no GPU"]
    json.dumps(cloud.controller.status())


def test_a_worker_that_keeps_no_delivery_is_told_of_and_not_ended(cloud: Cloud, log: Log) -> None:
    cloud.begin()
    cloud.worker(1).fault, cloud.worker(1).renews = "it keeps no delivery: no space left", True
    cloud.turn(5)
    assert cloud.faults() == ["worker 1 on gpu-1 (10.0.0.2): it keeps no delivery: no space left"]
    assert cloud.alive() == [0, 1]
    assert cloud.controller.state()["ready"]
    cloud.shift_owners_clock(60.0)
    cloud.turn(3)
    issued = [line["worker"] for line in log() if line["event"] == "certificate_issued"]
    assert issued == [0, 1]  # and not one in every round
    cloud.worker(1).fault = ""
    cloud.turn()
    assert cloud.faults() == []
    assert [line["worker"] for line in log() if line["event"] == "certificate_issued"] == [0, 1, 1]


def test_the_metrics_are_those_of_the_workers_that_answer(cloud: Cloud) -> None:
    assert cloud.begin(0).metrics() == b""
    cloud.turn(3)
    text = cloud.controller.metrics().decode()
    assert 'worker="0"' in text
    assert 'worker="1"' in text
    cloud.actor(0).is_silent = True
    assert cloud.controller.metrics() == cloud.worker(1).metrics()


def test_a_delivery_holds_nothing_secret(cloud: Cloud) -> None:
    """Ray has it in its memory on the way: certificates, public keys and addresses alone."""
    cloud.begin()
    delivery = cloud.worker(0).delivery
    assert set(dataclasses.asdict(delivery)) == set(dataclasses.asdict(Delivery()))
    issuer = load_issuer(cloud.owner.folder)
    secrets = [key.private_bytes_raw() for key in (issuer.key, cloud.worker(0).key, cloud.worker(1).key, cloud.node)]
    said = repr((delivery, cloud.spec, cloud.controller.state())).encode() + delivery.certificate.encode()
    for secret in secrets:
        assert secret not in said
        assert secret.hex().encode() not in said
    assert issuer.certificate.issuer not in secrets
