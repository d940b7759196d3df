"""The controller of a cloud on a cluster, without Ray: what it starts, certifies, delivers, scales, drains and ends."""

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
from support.cluster.fake_actors import FakeActor, FakeCluster, FakeWorker
from support.cluster.owners_folder import OwnersFolder

from isthmus.cloud.cluster import cluster_controller as controller_module
from isthmus.cloud.cluster.cluster_controller import RENEWED, RETRY_SECONDS, ClusterController, same_cloud
from isthmus.cloud.cluster.cluster_spec import Claims, ClusterSpec
from isthmus.cloud.control.autoscaler import GROW_SECONDS, PAUSE_SECONDS, SHRINK_SECONDS
from isthmus.cloud.control.controller import SPREAD_SECONDS
from isthmus.cloud.control.worker import WorkerSpec
from isthmus.cloud.directory import Peer
from isthmus.cloud.nodes.deliveries import AdapterPlace, Delivery
from isthmus.cloud.nodes.node_worker import NodeSpec, NodeWorker
from isthmus.cloud.telemetry.metrics import serve_metrics
from isthmus.common.errors import PortInUseError
from isthmus.protocol.enrolment import AuthorizedEdges, add_line
from isthmus.protocol.secure.certificates import CertificateRequest, WorkerCertificate
from isthmus.protocol.secure.keys import (
    Fingerprint,
    generate_edge,
    load_edge,
    load_issuer,
    load_node,
    make_issuer,
)

Log = Callable[[], list[dict[str, Any]]]


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Cloud:
    """A controller whose rounds the test turns, and the actors that it has started."""

    def __init__(self, owner: OwnersFolder, clock: Clock, patch: pytest.MonkeyPatch) -> None:
        self.owner, self.clock = owner, clock
        self.node = owner.node_key()
        self.now: Callable[[], float] = time.time  # of the nodes
        self.prepare: Callable[[FakeWorker], object] = lambda worker: None  # what a worker is like from its start on
        self.ray = FakeCluster(self._make)
        for name in ("start_anywhere", "wait_for"):
            patch.setattr(controller_module, name, getattr(self.ray, name))
        self.files_at = ""
        self.may_fetch: Callable[[], tuple[bytes, ...]] = tuple
        patch.setattr(controller_module, "ModelFiles", self._model_files)
        patch.setattr(controller_module, "log_to", lambda path: None)
        patch.setattr(controller_module, "time", SimpleNamespace(monotonic=clock, sleep=lambda seconds: None))
        own = SimpleNamespace(RLock=threading.RLock, Thread=lambda **_: SimpleNamespace(start=lambda: None))
        patch.setattr(controller_module, "threading", own)
        worker = WorkerSpec("/models/tiny", "tiny", "2:2", "fp32", "", "", "node:7443", 1, 1, 1, "")
        node = NodeSpec("cloud", owner.pin.digest, worker, "00" * 32, "tiny", "parts")
        self.spec = ClusterSpec("cloud", str(owner.folder), node, 2, 2, environment={"OMP_NUM_THREADS": "1"})

    def _make(self, kind: type, spec: NodeSpec) -> FakeWorker:
        assert kind is NodeWorker
        worker = FakeWorker(spec, self.node, lambda: self.now())
        self.prepare(worker)
        return worker

    def _model_files(self, spec: ClusterSpec, office: object, known: Callable[[], tuple[bytes, ...]]) -> Any:
        self.may_fetch = known
        return SimpleNamespace(start=lambda: self.files_at)

    def begin(self, rounds: int = 3, **changes: Any) -> ClusterController:
        """Start the controller, as Ray does it at first and whenever it has died, and have it serve."""
        self.spec = dataclasses.replace(self.spec, **changes)
        self.controller = ClusterController(self.spec)
        self.turn(rounds)
        return self.controller

    def turn(self, rounds: int = 1) -> None:
        for _ in range(rounds):
            self.controller._start_missing()
            self.controller._round()
            self.controller._scale()

    def actor(self, number: int) -> FakeActor:
        return self.ray.actors[f"isthmus-cloud-worker-{number}"]

    def worker(self, number: int) -> FakeWorker:
        found: FakeWorker = self.actor(number).inner
        return found

    def alive(self) -> list[int]:
        return sorted(each.inner.number for each in self.ray.actors.values() if not each.is_gone)

    def faults(self) -> list[str]:
        found: list[str] = self.controller.ready()["faults"]
        return found


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cloud(owner: OwnersFolder, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    return Cloud(owner, clock, monkeypatch)


def names(text: str) -> dict[str, bool]:
    """Who is enrolled in a text, and whether as a stage."""
    tenants = AuthorizedEdges.parse(text)._tenants.values()
    return {tenant.name: tenant.stage for tenant in tenants}


# Starting -------------------------------------------------------------------------------------------------------------


def test_workers_are_started_certified_and_ready_in_a_few_rounds(cloud: Cloud, log: Log) -> None:
    controller = cloud.begin(0, claims=Claims(1 << 30, 1, ({"zone": "a"},)))
    state = controller.ready()
    assert not state["ready"]
    assert state["waits"] == ["worker 0: a node with room for it", "worker 1: a node with room for it"]
    cloud.turn()
    assert controller.ready()["waits"] == ["worker 0: its certificate", "worker 1: its certificate"]
    cloud.turn()
    state = controller.ready()
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
    state = controller.ready()
    assert (state["ready"], state["waits"]) == (False, ["worker 1: its model"])
    assert state["places"] == ["10.0.0.1:7443"]
    cloud.worker(1).waits = ""
    cloud.turn()
    assert controller.ready()["ready"]


def test_a_controller_that_cannot_serve_its_status_says_so(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_module, "REBINDS", 1)
    other = serve_metrics("127.0.0.1", 0, bytes, dict)
    try:
        taken = f"127.0.0.1:{other.server_port}"
        with pytest.raises(PortInUseError, match="choose another --metrics"):
            cloud.begin(metrics=taken).ready()
    finally:
        other.shutdown()
        other.server_close()
    assert not cloud.begin(0, metrics="").ready()["ready"]


def test_a_round_that_fails_is_logged_and_the_next_one_goes_on(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    controller = cloud.begin(0)
    turns = itertools.count(1)

    def rounds() -> None:
        if (turn := next(turns)) == 1:
            raise RuntimeError("Ray is away")
        if turn == 3:
            controller.stop(0.0)

    monkeypatch.setattr(controller, "_round", rounds)
    controller._run()
    assert next(turns) == 4
    assert [line["error"] for line in log() if line["event"] == "round_failed"] == ["RuntimeError: Ray is away"]


# Certificates ---------------------------------------------------------------------------------------------------------


def test_a_worker_on_a_node_that_is_not_enrolled_is_ended_and_nobody_knows_it(cloud: Cloud) -> None:
    home = cloud.owner.new_node("gpu-9", enrolled=False)
    stranger = load_node(home)
    cloud.prepare = lambda worker: setattr(worker, "node", stranger if worker.number == 1 else worker.node)
    cloud.begin()
    assert cloud.actor(1).was_killed
    assert not cloud.worker(1).is_certified
    key = Fingerprint.of(stranger.public_key().public_bytes_raw())
    fault = f"worker 1 on gpu-1 (10.0.0.2) may not serve: the node's key {key} is not enrolled"
    assert [each.startswith(fault) for each in cloud.faults()] == [True]
    assert names(cloud.worker(0).delivery.authorized_edges) == {}
    assert cloud.may_fetch() == (cloud.worker(0).raw,)
    add_line(cloud.owner.folder / "authorized_nodes", (home / "node_key.pub").read_text(), "gpu-9")
    cloud.clock.now += RETRY_SECONDS
    cloud.turn(3)
    assert cloud.worker(1).is_certified
    assert cloud.faults() == []
    assert names(cloud.worker(0).delivery.authorized_edges) == {"worker-1@cloud": True}
    assert cloud.may_fetch() == (cloud.worker(0).raw, cloud.worker(1).raw)
    assert cloud.controller.ready()["ready"]


def test_a_worker_whose_node_is_not_enrolled_any_more_is_ended(cloud: Cloud) -> None:
    cloud.begin()
    assert cloud.controller.ready()["ready"]
    nodes = cloud.owner.folder / "authorized_nodes"
    enrolled = nodes.read_text()
    cloud.worker(1).node = cloud.owner.node_key("gpu-2")
    cloud.turn()
    assert cloud.alive() == [0, 1]
    nodes.write_text(enrolled)  # without the second node
    cloud.turn(2)
    assert cloud.alive() == [0]
    assert names(cloud.worker(0).delivery.authorized_edges) == {}


def test_a_worker_whose_nodes_clock_is_wrong_is_ended(cloud: Cloud) -> None:
    cloud.now = lambda: time.time() - 3600
    cloud.begin()
    assert cloud.alive() == []
    assert all("may not serve" in fault and "set its node's clock" in fault for fault in cloud.faults())
    assert len(cloud.faults()) == 2
    cloud.now = time.time
    cloud.clock.now += RETRY_SECONDS
    cloud.turn(3)
    assert cloud.worker(0).is_certified
    assert cloud.faults() == []


def test_a_worker_that_asks_for_another_ones_key_is_ended(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud.begin()
    first, second = cloud.worker(0), cloud.worker(1)
    honest = first.exchange
    other = CertificateRequest.make(cloud.node, cloud.owner.pin.digest, second.raw, time.time())
    monkeypatch.setattr(first, "exchange", lambda *given: dataclasses.replace(honest(*given), request=other))
    cloud.turn()
    assert cloud.actor(0).was_killed
    assert cloud.faults() == ["worker 0 on gpu-0 (10.0.0.1) may not serve: it asks for another key than its own"]
    assert cloud.may_fetch() == (second.raw,)


def test_an_expired_issuer_is_a_fault_and_a_renewed_one_is_used_at_once(cloud: Cloud) -> None:
    make_issuer(cloud.owner.folder, 1, lambda: time.time() - 2 * 86_400)
    cloud.begin()
    assert not cloud.worker(0).is_certified
    assert all("gets no certificate" in fault and "issuer expired" in fault for fault in cloud.faults())
    assert len(cloud.faults()) == 2
    assert cloud.alive() == [0, 1]
    assert names(cloud.worker(0).delivery.authorized_edges) == {"worker-1@cloud": True}  # its node is enrolled
    make_issuer(cloud.owner.folder, 1)
    cloud.turn(2)
    assert cloud.worker(0).is_certified
    assert cloud.faults() == []


def test_a_malformed_list_of_nodes_ends_nobody(cloud: Cloud) -> None:
    cloud.begin()
    nodes = cloud.owner.folder / "authorized_nodes"
    good = nodes.read_text()
    nodes.write_text("nonsense")
    cloud.turn(2)
    assert cloud.alive() == [0, 1]
    assert all("line 1" in fault for fault in cloud.faults())
    assert len(cloud.faults()) == 2
    assert names(cloud.worker(0).delivery.authorized_edges) == {"worker-1@cloud": True}
    nodes.write_text(good)
    cloud.turn()
    assert cloud.faults() == []


def test_a_certificate_lasts_its_hours_and_is_renewed_when_its_worker_asks(cloud: Cloud) -> None:
    cloud.begin(hours=2.0)
    first = WorkerCertificate.from_json(cloud.worker(0).delivery.certificate)
    assert abs(first.not_after - time.time() - 7200) < 600
    cloud.now = lambda: time.time() + 60
    cloud.controller._office._now = cloud.now
    cloud.worker(0).renews = True
    cloud.turn()
    cloud.worker(0).renews = False
    cloud.turn()
    second = WorkerCertificate.from_json(cloud.worker(0).delivery.certificate)
    assert second.worker == first.worker
    assert second.not_after > first.not_after


def test_a_renewal_that_its_issuers_end_makes_no_longer_is_not_logged_again(cloud: Cloud, log: Log) -> None:
    """A worker asks in every round then, for as long as the issuer is not renewed."""
    cloud.begin(hours=24 * 30)
    cloud.worker(0).renews = True
    cloud.turn(5)
    issued = [line["worker"] for line in log() if line["event"] == "certificate_issued"]
    assert issued == [0, 1]
    make_issuer(cloud.owner.folder, 9)
    cloud.turn()
    issued = [line["worker"] for line in log() if line["event"] == "certificate_issued"]
    assert issued == [0, 1, 0]


# Deliveries -----------------------------------------------------------------------------------------------------------


def test_each_worker_knows_the_tenants_and_the_other_workers_as_such(cloud: Cloud, tmp_path: Path) -> None:
    add_line(cloud.owner.folder / "authorized_edges", generate_edge(tmp_path / "id", "alice"))
    cloud.begin(least=3, most=3)
    delivered = cloud.worker(0).delivery.authorized_edges
    assert names(delivered) == {"alice": False, "worker-1@cloud": True, "worker-2@cloud": True}
    edges = AuthorizedEdges.parse(delivered)
    assert edges.find(cloud.worker(1).raw) is not None
    assert edges.find(cloud.worker(0).raw) is None
    assert edges.find(load_edge(tmp_path / "id").public_key().public_bytes_raw()) is not None


def test_tenants_that_come_and_go_are_noticed_and_a_malformed_file_changes_nothing(
    cloud: Cloud, tmp_path: Path
) -> None:
    path = cloud.owner.folder / "authorized_edges"
    cloud.begin()
    assert "alice" not in names(cloud.worker(0).delivery.authorized_edges)
    add_line(path, generate_edge(tmp_path / "id", "alice"))
    cloud.turn()
    assert names(cloud.worker(0).delivery.authorized_edges)["alice"] is False
    good = path.read_text()
    path.write_text(good + "nonsense\n")
    cloud.turn(2)
    assert "alice" in names(cloud.worker(0).delivery.authorized_edges)
    assert [fault for fault in cloud.faults() if "line 2" in fault]
    path.write_text("# nobody any more\n")
    cloud.turn(2)
    assert "alice" not in names(cloud.worker(0).delivery.authorized_edges)
    assert cloud.faults() == []


def test_what_a_worker_has_is_not_sent_again(cloud: Cloud, tmp_path: Path) -> None:
    cloud.begin(5)
    worker = cloud.worker(0)
    before = len(worker.deliveries)
    cloud.turn(3)
    assert worker.deliveries[before:] == [None] * 3
    add_line(cloud.owner.folder / "authorized_edges", generate_edge(tmp_path / "id", "alice"))
    cloud.turn(3)
    assert [each is None for each in worker.deliveries[-3:]] == [False, True, True]


def test_the_model_is_at_the_workers_that_serve_it_and_answer(cloud: Cloud) -> None:
    cloud.begin(4, least=4, most=4)
    places = [cloud.worker(number).place for number in range(4)]
    assert cloud.worker(0).delivery.models_at == tuple(places[1:])
    cloud.worker(1).has_model = False
    cloud.worker(2).waits = "its layers to be loaded"
    cloud.turn(2)
    assert cloud.worker(0).delivery.models_at == (places[3],)
    cloud.actor(3).is_silent = True
    cloud.turn(2)
    assert cloud.worker(0).delivery.models_at == ()
    cloud.files_at = "10.0.0.9:40000"
    cloud.actor(3).is_silent = False
    cloud.begin(3)
    assert cloud.worker(0).delivery.models_at == ("10.0.0.9:40000", places[3])


def test_workers_are_told_where_newer_adapters_are(cloud: Cloud) -> None:
    cloud.begin(3, least=3, most=3)
    cloud.worker(0).adapters = {"aa": 5, "bb": 1}
    cloud.worker(1).adapters = {"aa": 7}
    cloud.turn(2)
    newest, other = AdapterPlace("aa", 7, cloud.worker(1).place), AdapterPlace("bb", 1, cloud.worker(0).place)
    assert cloud.worker(0).delivery.adapters == (newest,)
    assert cloud.worker(1).delivery.adapters == (other,)
    assert cloud.worker(2).delivery.adapters == (newest, other)
    for number in range(3):
        cloud.worker(number).adapters = {"aa": 7, "bb": 1}
    cloud.turn(2)
    assert [cloud.worker(number).delivery.adapters for number in range(3)] == [()] * 3


def test_workers_hear_of_each_other_and_edges_are_not_sent_to_a_silent_one(cloud: Cloud) -> None:
    cloud.begin(3, least=3, most=3)
    cloud.turn()
    peers = [Peer(cloud.worker(number).place, "serving") for number in range(3)]
    assert cloud.worker(0).updates[-1].peers == (peers[1], peers[2])
    cloud.actor(1).is_silent = True
    cloud.turn(2)
    assert cloud.worker(0).updates[-1].peers == (peers[2],)
    assert cloud.controller.ready()["waits"] == ["worker 1: an answer"]
    cloud.actor(1).is_silent = False
    cloud.turn(2)
    assert cloud.worker(0).updates[-1].peers == (peers[1], peers[2])
    assert cloud.controller.ready()["waits"] == []


def test_a_worker_with_more_sessions_is_told_to_end_some(cloud: Cloud) -> None:
    cloud.begin()
    cloud.worker(0).sessions = 4
    cloud.turn(2)
    assert cloud.worker(0).updates[-1].end_newest == 0
    cloud.clock.now += SPREAD_SECONDS
    cloud.turn()
    assert cloud.worker(0).updates[-1].end_newest == 2


# Pipelines ------------------------------------------------------------------------------------------------------------


def pipeline(cloud: Cloud) -> None:
    cloud.begin(4, stages=("2:3", "3:4", "4:5"), least=3, most=3)


def test_stages_know_the_next_one_and_edges_the_first_alone(cloud: Cloud, tmp_path: Path) -> None:
    add_line(cloud.owner.folder / "authorized_edges", generate_edge(tmp_path / "id", "alice"))
    pipeline(cloud)
    places = [cloud.worker(number).place for number in range(3)]
    assert [cloud.worker(number).delivery.next_stage for number in range(3)] == [places[1], places[2], ""]
    assert ["alice" in names(cloud.worker(number).delivery.authorized_edges) for number in range(3)] == [
        True,
        False,
        False,
    ]
    assert names(cloud.worker(1).delivery.authorized_edges) == {"worker-0@cloud": True, "worker-2@cloud": True}
    assert cloud.controller.ready()["places"] == [places[0]]
    specs = [cloud.worker(number).spec for number in range(3)]
    assert [(spec.worker.layers, spec.inner, spec.last) for spec in specs] == [
        ("2:3", False, False),
        ("3:4", True, False),
        ("4:5", True, True),
    ]
    cloud.worker(0).adapters = {"aa": 5}
    cloud.turn(2)
    assert cloud.worker(1).delivery.adapters == ()  # a pipeline plugs none in


def test_a_silent_stage_keeps_its_address_and_a_moved_one_has_its_new_one(cloud: Cloud) -> None:
    pipeline(cloud)
    before = cloud.worker(1).place
    cloud.actor(1).is_silent = True
    cloud.turn(3)
    assert cloud.worker(0).delivery.next_stage == before
    cloud.actor(1).is_silent = False
    cloud.worker(1).host, cloud.worker(1).waits = "10.0.0.9", "its model"  # Ray has placed it on another node
    cloud.turn(2)
    assert cloud.worker(0).delivery.next_stage == ""
    cloud.worker(1).waits = ""
    cloud.turn(2)
    assert cloud.worker(0).delivery.next_stage == "10.0.0.9:7444"


def test_a_pipeline_is_never_scaled_by_its_load(cloud: Cloud) -> None:
    pipeline(cloud)
    cloud.worker(0).overdue = cloud.worker(0).waiting = 99
    for _ in range(3):
        cloud.clock.now += GROW_SECONDS + PAUSE_SECONDS
        cloud.turn()
    assert cloud.alive() == [0, 1, 2]


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
    assert cloud.controller.ready()["ready"]


def test_a_silent_worker_is_asked_once_and_not_started_again(cloud: Cloud) -> None:
    cloud.begin()
    actor = cloud.actor(1)
    actor.is_silent = True
    before = len(actor.calls)
    cloud.turn(5)
    assert len(actor.calls) == before + 1
    assert cloud.actor(1) is actor
    assert not cloud.controller.ready()["ready"]


def test_a_worker_that_has_failed_is_ended_and_started_again_after_a_pause(cloud: Cloud) -> None:
    cloud.prepare = lambda worker: setattr(worker, "failure", "no GPU" if worker.number == 1 else "")
    cloud.begin(2)
    failed = cloud.actor(1)
    assert failed.was_killed
    assert cloud.faults() == ["worker 1 on gpu-1 (10.0.0.2) cannot serve: no GPU"]
    assert cloud.controller.ready()["waits"] == ["worker 1: worker 1 on gpu-1 (10.0.0.2) cannot serve: no GPU"]
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
    assert cloud.controller.ready()["ready"]


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
    state = cloud.controller.ready()
    assert (state["ready"], state["places"]) == (True, [worker.place for worker in before])
    assert cloud.controller.status()["restarts"] == 1


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


def test_a_controller_that_is_restarted_knows_how_many_workers_there_should_be(cloud: Cloud) -> None:
    cloud.begin()
    cloud.controller.scale(3, 5)
    assert (cloud.owner.folder / "cluster.json").stat().st_mode & 0o777 == 0o600
    assert cloud.begin(2).ready()["counts"] == (3, 5)
    assert cloud.alive() == [0, 1, 2]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"least": 3}', '{"least": "x", "most": 5}', '{"least": 5, "most": 3}'),
        *('{"least": 0, "most": 3}', '{"least": 3, "most": 1000}', '{"least": null, "most": 5}'),
    ],
)
def test_a_damaged_count_is_not_used(cloud: Cloud, text: str) -> None:
    path = cloud.owner.folder / "cluster.json"
    path.write_text(json.dumps({"least": 3, "most": 5}))
    assert cloud.begin(0).ready()["counts"] == (3, 5)
    path.write_text(text)
    assert cloud.begin(0).ready()["counts"] == (2, 2)


def test_a_pipeline_has_as_many_workers_as_stages_whatever_was_scaled_before(cloud: Cloud) -> None:
    (cloud.owner.folder / "cluster.json").write_text(json.dumps({"least": 1, "most": 5}))
    pipeline(cloud)
    assert cloud.controller.ready()["counts"] == (3, 3)
    assert cloud.alive() == [0, 1, 2]


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
    assert names(cloud.worker(0).delivery.authorized_edges) == {"worker-1@cloud": True}


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
    cloud.turn(4)
    assert ending.was_killed
    assert cloud.actor(1) is not ending
    assert cloud.alive() == [0, 1, 2]
    assert cloud.controller.ready()["ready"]


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


def test_the_fault_of_a_worker_that_is_not_wanted_any_more_goes_with_it(cloud: Cloud) -> None:
    cloud.prepare = lambda worker: setattr(worker, "failure", "no GPU" if worker.number == 2 else "")
    cloud.begin(3, least=3, most=3)
    assert len(cloud.faults()) == 1
    cloud.controller.scale(2, 2)
    cloud.turn(2)
    assert cloud.faults() == []
    assert cloud.controller.ready()["ready"]


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
    assert not (cloud.owner.folder / "cluster.json").exists()
    cloud.controller._run()  # has nothing to do any more
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


# For the operator -----------------------------------------------------------------------------------------------------


def test_the_status_names_the_nodes_and_what_is_wrong(cloud: Cloud) -> None:
    cloud.prepare = lambda worker: setattr(worker, "waits", "its model" if worker.number == 1 else "")
    cloud.begin()
    status = cloud.controller.status()
    assert [(worker["state"], worker["node"]) for worker in status["workers"]] == [
        ("serving", "gpu-0 (10.0.0.1)"),
        ("starting", "gpu-1 (10.0.0.2)"),
    ]
    assert (status["state"], status["certificates"], status["model"]) == ("serving", RENEWED, "tiny")
    assert "faults" not in status
    cloud.prepare = lambda worker: setattr(worker, "failure", "no GPU")
    cloud.actor(1).is_gone = True
    cloud.turn(2)
    assert cloud.controller.status()["faults"] == ["worker 1 on gpu-1 (10.0.0.2) cannot serve: no GPU"]
    json.dumps(cloud.controller.status())


def test_the_metrics_are_those_of_the_workers_that_answer(cloud: Cloud) -> None:
    assert cloud.begin(0).metrics() == b""
    cloud.turn(3)
    text = cloud.controller.metrics().decode()
    assert 'worker="0"' in text
    assert 'worker="1"' in text
    cloud.actor(0).is_silent = True
    assert cloud.controller.metrics() == cloud.worker(1).metrics()


def test_two_clouds_are_the_same_where_only_counts_and_places_differ(cloud: Cloud) -> None:
    spec = cloud.spec
    beside = dataclasses.replace(spec.worker, worker=dataclasses.replace(spec.worker.worker, beside=9))
    assert same_cloud(spec, dataclasses.replace(spec, least=1, most=9, places=("a:1",), worker=beside))
    for changes in (
        {"cloud": "other"},
        {"stages": ("2:3", "3:5")},
        {"hours": 1.0},
        {"claims": Claims(1)},
        {"worker": dataclasses.replace(spec.worker, digest="11" * 32)},
        {"worker": dataclasses.replace(spec.worker, worker=dataclasses.replace(spec.worker.worker, threads=2))},
        {"environment": {}},
    ):
        assert not same_cloud(spec, dataclasses.replace(spec, **changes))


def test_a_delivery_holds_nothing_secret(cloud: Cloud) -> None:
    """Ray has it in its memory on the way: certificates, public keys and addresses alone."""
    cloud.begin()
    delivery = cloud.worker(0).delivery
    assert set(dataclasses.asdict(delivery)) == set(dataclasses.asdict(Delivery()))
    issuer = load_issuer(cloud.owner.folder)
    secrets = [key.private_bytes_raw() for key in (issuer.key, cloud.worker(0).key, cloud.worker(1).key, cloud.node)]
    said = repr((delivery, cloud.spec, cloud.controller.ready())).encode() + delivery.certificate.encode()
    for secret in secrets:
        assert secret not in said
        assert secret.hex().encode() not in said
    assert issuer.certificate.issuer not in secrets
