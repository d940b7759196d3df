"""The controller of a cloud on a cluster, without Ray: what it starts, starts again, and tells its operator."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from support.cluster.controlled_cloud import Cloud

from isthmus.cloud.cluster import cluster_controller as controller_module
from isthmus.cloud.cluster.cluster_controller import RETRY_SECONDS
from isthmus.cloud.cluster.cluster_spec import Claims
from isthmus.cloud.control import controller as pages
from isthmus.cloud.nodes.deliveries import Delivery
from isthmus.cloud.telemetry.metrics import serve_metrics
from isthmus.common.errors import PortInUseError
from isthmus.protocol.secure.certificates import WorkerCertificate
from isthmus.protocol.secure.keys import (
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
