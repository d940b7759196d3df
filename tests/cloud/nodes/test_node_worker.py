"""A worker on a node, driven by a controller's questions: what it waits for, where it listens, what it fetches."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import threading
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support.cloud.packages import tiny_package, tuned
from support.cloud.sessions import eventually, hidden
from support.cluster.owners_folder import OwnersFolder

from isthmus.backbone.checkpoints.sources import Checkpoint, default_cache
from isthmus.cloud.control import worker as control_worker
from isthmus.cloud.control.ports import Ports
from isthmus.cloud.control.worker import WorkerSpec
from isthmus.cloud.directory import Peer, Report, Update
from isthmus.cloud.nodes import node_worker
from isthmus.cloud.nodes.deliveries import AdapterPlace, Delivery, NodeReport
from isthmus.cloud.nodes.node_worker import NodeSpec, NodeWorker
from isthmus.common.errors import ConnectionLostError, NotEnrolledError, PortInUseError
from isthmus.edge.client.link import connect
from isthmus.emulator.package.offered_files import adapter_prefix
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import STAGE_OPTIONS, ConnectionString
from isthmus.protocol.secure.keys import Fingerprint, format_public_key, generate_edge, load_edge, load_issuer

TENANT, THEN = "ab" * 32, 1_700_000_000_123

pytestmark = pytest.mark.usefixtures("node")


def spec_of(
    owner: OwnersFolder, model: Path | str = "/nowhere", *, number: int = 0, listen: str = "node:7443", **changes: Any
) -> NodeSpec:
    worker = WorkerSpec(
        checkpoint=str(model),
        model="tiny",
        plan="2:2",
        dtype="fp32",
        parts="/owners/cache/parts-of-tiny",
        home="/owners/home",
        listen=listen,
        stash_bytes=1 << 26,
        max_tokens=4096,
        threads=1,
        log_file="/owners/home/worker.log",
        number=number,
        beside=2,
    )
    digest = Checkpoint(Path(model), "tiny").digest() if model != "/nowhere" else "00" * 32
    return dataclasses.replace(NodeSpec("cloud", owner.pin.digest, worker, digest, "", "parts-of-tiny"), **changes)


class FakeWorker:
    """What serves, without a model and a server."""

    made: ClassVar[list[FakeWorker]] = []

    def __init__(self, spec: WorkerSpec, *, rebinds: int | None = None) -> None:
        self.spec, self.rebinds = spec, rebinds
        self.failure: Exception | None = None
        self.held: dict[str, int] = {}
        self.taken: list[tuple[str, int, dict[str, bytes]]] = []
        self.updates: list[Update] = []
        self.graces: list[float] = []
        FakeWorker.made.append(self)

    def port(self) -> int:
        if self.failure is not None:
            raise self.failure
        return 7443

    def exchange(self, update: Update) -> Report:
        self.updates.append(update)
        status = {"worker": self.spec.number, "state": "serving", "pid": 1, "restarts": 0, "positions": 0}
        return Report(status, Peer(self.spec.address, "serving"))

    def adapters_held(self) -> dict[str, int]:
        return dict(self.held)

    def take_adapter(self, tenant: str, plugged_at: int, files: Mapping[str, Path]) -> None:
        self.taken.append((tenant, plugged_at, {name: path.read_bytes() for name, path in files.items()}))
        self.held[tenant] = plugged_at

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run(work)

    def metrics(self) -> bytes:
        return b"positions 0\n"

    def drain(self, grace: float) -> bool:
        self.graces.append(grace)
        return False


@pytest.fixture(autouse=True)
def on_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray, and without a pause."""
    monkeypatch.setattr(node_worker, "node_address", lambda: "10.0.0.5")
    monkeypatch.setattr(node_worker, "_import_heavy", lambda: None)
    monkeypatch.setattr(node_worker, "WAIT_SECONDS", 0.001)
    for module in (node_worker, control_worker):  # a process has one log, and these tests have several workers
        monkeypatch.setattr(module, "log_to", lambda path: None)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeWorker]:
    """No model is looked for, and nothing is served."""
    FakeWorker.made.clear()
    monkeypatch.setattr(node_worker, "Worker", FakeWorker)
    monkeypatch.setattr(NodeWorker, "_find_model", lambda self, home: Path("/models/found"))
    return FakeWorker


def ask(worker: NodeWorker, delivery: Delivery | None = None, update: Update | None = None) -> NodeReport:
    return worker.exchange(update or Update(), delivery)


def certificate(owner: OwnersFolder, worker: NodeWorker) -> str:
    issuer = load_issuer(owner.folder)
    return issuer.issue(ask(worker).key, issuer.certificate.not_after).to_json()


def settled(worker: NodeWorker) -> NodeReport:
    """Its report once it serves, or has failed."""
    eventually(lambda: not ask(worker).waits or bool(ask(worker).failure), 60)
    return ask(worker)


# Settling -------------------------------------------------------------------------------------------------------------


def test_a_worker_asks_for_a_certificate_and_then_serves(owner: OwnersFolder, fake: type[FakeWorker]) -> None:
    worker = NodeWorker(spec_of(owner))
    report = ask(worker)
    assert (report.waits, report.failure, report.revision) == ("its certificate", "", Delivery().revision)
    assert report.request is not None
    assert report.request.worker == report.key
    assert report.wants_certificate
    assert report.report.peer is None
    assert report.report.status["state"] == "starting"
    assert fake.made == []
    delivery = Delivery(certificate(owner, worker))
    assert ask(worker, delivery).revision == delivery.revision
    report = settled(worker)
    assert (report.waits, report.failure, report.wants_certificate, report.has_model) == ("", "", False, True)
    assert report.request is not None  # its node's word, which every round asks for
    assert report.report.peer == Peer("10.0.0.5:7443", "serving")
    assert [each.rebinds for each in fake.made] == [node_worker.REBINDS]


def test_what_serves_has_the_files_of_this_node(owner: OwnersFolder, node: Path, fake: type[FakeWorker]) -> None:
    worker = NodeWorker(spec_of(owner, number=1))
    ask(worker, Delivery(certificate(owner, worker)))
    settled(worker)
    (serving,) = fake.made
    home = node / f"cloud-{owner.pin.digest.hex()[:12]}" / "worker-1"
    assert serving.spec == dataclasses.replace(
        spec_of(owner, number=1).worker,
        checkpoint="/models/found",
        parts=str(default_cache().absolute() / "edge-parts" / "parts-of-tiny"),
        home=str(home),
        listen="10.0.0.5:7444",
        address="10.0.0.5:7444",
        log_file=str(home / "worker-1.log"),
        shares_model=True,
    )


def test_threads_that_nobody_has_named_are_a_share_of_the_nodes_cores(
    owner: OwnersFolder, fake: type[FakeWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_worker, "usable_cores", lambda: 8)
    spec = spec_of(owner)
    for threads, expected in ((0, 4), (3, 3)):
        worker = NodeWorker(dataclasses.replace(spec, worker=dataclasses.replace(spec.worker, threads=threads)))
        ask(worker, Delivery(certificate(owner, worker)))
        settled(worker)
        assert fake.made[-1].spec.threads == expected


def test_a_stage_inside_a_pipeline_reads_its_neighbours_from_files(owner: OwnersFolder, fake: type[FakeWorker]) -> None:
    for inner, last in ((False, False), (True, False), (True, True)):
        worker = NodeWorker(spec_of(owner, number=int(inner), inner=inner, last=last))
        ask(worker, Delivery(certificate(owner, worker), next_stage="10.0.0.6:7444"))
        report = settled(worker)
        served, home = fake.made[-1].spec, Path(fake.made[-1].spec.home)
        assert served.edges == (str(home) if inner else "")
        assert served.next_stage == ("" if last else str(home / "next_stage"))
        assert (home / "next_stage").read_text() == "10.0.0.6:7444"
        assert report.has_model


def test_a_saved_span_is_where_all_nodes_have_it_and_shared_with_nobody(
    owner: OwnersFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeWorker.made.clear()
    monkeypatch.setattr(node_worker, "Worker", FakeWorker)
    spec = spec_of(owner, parts="")
    saved = dataclasses.replace(spec.worker, checkpoint="/shared/span/parts", saved_span="/shared/span")
    worker = NodeWorker(dataclasses.replace(spec, worker=saved))
    ask(worker, Delivery(certificate(owner, worker)))
    assert not settled(worker).has_model
    served = FakeWorker.made[-1].spec
    assert (served.checkpoint, served.parts) == ("/shared/span/parts", "/shared/span/parts")
    assert not served.shares_model


@pytest.mark.parametrize(
    ("listen", "changes", "expected"),
    [
        ("node:7443", {}, ("10.0.0.5:7445", "10.0.0.5:7445", "10.0.0.5:7445")),
        ("0.0.0.0:7443", {}, ("0.0.0.0:7445", "10.0.0.5:7445", "10.0.0.5:7445")),
        ("[::]:7443", {}, ("[::]:7445", "10.0.0.5:7445", "10.0.0.5:7445")),
        ("node:7443", {"advertise": "lb"}, ("10.0.0.5:7443", "10.0.0.5:7443", "lb:7443")),
        ("node:7443", {"advertise": "lb", "inner": True}, ("10.0.0.5:7443", "10.0.0.5:7443", "10.0.0.5:7443")),
    ],
)
def test_where_a_worker_listens_and_where_it_is_found(
    owner: OwnersFolder, fake: type[FakeWorker], listen: str, changes: dict[str, Any], expected: tuple[str, str, str]
) -> None:
    worker = NodeWorker(spec_of(owner, number=2, listen=listen, **changes))
    ask(worker, Delivery(certificate(owner, worker)))
    report = settled(worker)
    served = fake.made[-1].spec
    assert (served.listen, report.place, served.address) == expected


def test_a_node_with_an_ipv6_address_writes_it_in_brackets(
    owner: OwnersFolder, fake: type[FakeWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_worker, "node_address", lambda: "fd00::5")
    worker = NodeWorker(spec_of(owner))
    ask(worker, Delivery(certificate(owner, worker)))
    assert settled(worker).place == fake.made[-1].spec.listen == "[fd00::5]:7443"


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_a_node_without_a_key_is_a_failure_that_says_what_to_do(
    owner: OwnersFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_NODE_HOME", str(tmp_path / "bare"))
    report = ask(NodeWorker(spec_of(owner)), Delivery("nonsense", "edges"))
    assert "run `isthmus cloud node-keygen` on this node" in report.failure
    assert (report.key, report.request, report.wants_certificate, report.has_model) == (b"", None, False, False)
    assert not list((tmp_path / "bare").rglob("authorized_edges"))


def test_a_worker_that_cannot_start_reports_why(owner: OwnersFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(FakeWorker):
        def __init__(self, spec: WorkerSpec, **options: Any) -> None:
            super().__init__(spec, **options)
            self.failure = PortInUseError("cannot listen on 10.0.0.5:7443")

    monkeypatch.setattr(node_worker, "Worker", Failing)
    monkeypatch.setattr(NodeWorker, "_find_model", lambda self, home: Path("/models/found"))
    worker = NodeWorker(spec_of(owner))
    ask(worker, Delivery(certificate(owner, worker)))
    eventually(lambda: bool(ask(worker).failure))
    report = ask(worker)
    assert report.failure == "cannot listen on 10.0.0.5:7443"
    assert report.report.status["waits"] == report.failure
    assert report.report.peer is None
    assert worker.drain(1.0)
    assert worker.metrics() == b""


def test_even_a_bug_is_told_to_the_operator(
    owner: OwnersFolder, fake: type[FakeWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: NodeWorker, home: object) -> Path:
        raise ZeroDivisionError("division by zero")

    raised: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda of_thread: raised.append(of_thread.exc_type))
    monkeypatch.setattr(NodeWorker, "_find_model", broken)
    worker = NodeWorker(spec_of(owner))
    ask(worker, Delivery(certificate(owner, worker)))
    eventually(lambda: bool(raised))
    assert ask(worker).failure == "ZeroDivisionError: division by zero"
    assert raised == [ZeroDivisionError]
    assert fake.made == []


def test_a_delivery_that_cannot_be_written_is_not_reported_as_taken(
    owner: OwnersFolder, fake: type[FakeWorker], node: Path
) -> None:
    worker = NodeWorker(spec_of(owner))
    delivery = Delivery(certificate(owner, worker), "# nobody\n", "10.0.0.6:7444")
    folder = node / f"cloud-{owner.pin.digest.hex()[:12]}" / "worker-0"
    away = folder.rename(node / "away")
    assert ask(worker, delivery).revision == Delivery().revision
    away.rename(folder)
    assert ask(worker, delivery).revision == delivery.revision
    settled(worker)
    assert len(fake.made) == 1


def test_updates_metrics_and_drains_reach_what_serves(owner: OwnersFolder, fake: type[FakeWorker]) -> None:
    worker = NodeWorker(spec_of(owner))
    assert worker.metrics() == b""
    assert worker.drain(1.0)
    assert ask(worker, update=Update(restarts=3)).report.status["restarts"] == 3
    assert ask(worker).report.status["restarts"] == 3
    ask(worker, Delivery(certificate(owner, worker)))
    settled(worker)
    update = Update((Peer("10.0.0.6:7444", "serving"),))
    ask(worker, update=update)
    (serving,) = fake.made
    assert serving.updates[-1] == update
    assert worker.metrics() == b"positions 0\n"
    assert not worker.drain(2.5)
    assert serving.graces == [2.5]


# Adapters of other workers --------------------------------------------------------------------------------------------


class FakePeers:
    """Other workers; those in `gone` do not answer."""

    gone: ClassVar[set[str]] = set()
    asked: ClassVar[list[tuple[str, m.FileSet]]] = []
    going_on = threading.Event()

    def __init__(self, pin: Fingerprint, key: object) -> None:
        self.pin = pin

    async def fetch(self, address: str, file_set: m.FileSet, folder: Path, wanted: Callable[[str], bool]) -> list[str]:
        FakePeers.going_on.wait(30)
        FakePeers.asked.append((address, file_set))
        if address in FakePeers.gone:
            raise ConnectionLostError("it is gone")
        names = [f"{adapter_prefix(TENANT, at)}adapter_config.json" for at in (THEN, THEN + 1)]
        taken = [name for name in names if wanted(name)]
        for name in taken:
            (folder / name).write_text(name)
        return taken


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> type[FakePeers]:
    FakePeers.gone.clear()
    FakePeers.asked.clear()
    FakePeers.going_on.set()
    monkeypatch.setattr("isthmus.cloud.nodes.peers.Peers", FakePeers)
    return FakePeers


def serving_worker(owner: OwnersFolder, fake: type[FakeWorker]) -> tuple[NodeWorker, FakeWorker]:
    worker = NodeWorker(spec_of(owner))
    ask(worker, Delivery(certificate(owner, worker)))
    settled(worker)
    return worker, fake.made[-1]


def test_an_adapter_from_elsewhere_is_plugged_in_under_its_own_names(
    owner: OwnersFolder, fake: type[FakeWorker], others: type[FakePeers], node: Path
) -> None:
    worker, serving = serving_worker(owner, fake)
    ask(worker, Delivery(adapters=(AdapterPlace(TENANT, THEN, "10.0.0.6:7444"),)))
    eventually(lambda: ask(worker).adapters == {TENANT: THEN})
    name = f"{adapter_prefix(TENANT, THEN)}adapter_config.json"
    assert serving.taken == [(TENANT, THEN, {"adapter_config.json": name.encode()})]
    assert others.asked == [("10.0.0.6:7444", m.FileSet.ADAPTERS)]
    eventually(lambda: not any(path.is_file() for path in node.rglob("copies/*/*")))


def test_an_adapter_that_cannot_be_had_does_not_keep_others_away(
    owner: OwnersFolder, fake: type[FakeWorker], others: type[FakePeers], node: Path
) -> None:
    worker, serving = serving_worker(owner, fake)
    others.gone.add("10.0.0.6:7444")
    places = (AdapterPlace("cd" * 32, THEN, "10.0.0.6:7444"), AdapterPlace(TENANT, THEN, "10.0.0.7:7445"))
    ask(worker, Delivery(adapters=places))
    eventually(lambda: bool(serving.taken))
    assert [tenant for tenant, _, _ in serving.taken] == [TENANT]
    eventually(lambda: not worker._copying)
    assert not list(node.rglob("copies/*"))


def test_an_adapter_that_has_changed_meanwhile_is_left_for_the_next_round(
    owner: OwnersFolder, fake: type[FakeWorker], others: type[FakePeers]
) -> None:
    worker, serving = serving_worker(owner, fake)
    ask(worker, Delivery(adapters=(AdapterPlace(TENANT, THEN - 1, "10.0.0.6:7444"),)))
    eventually(lambda: bool(others.asked) and not worker._copying)
    assert serving.taken == []


def test_adapters_are_copied_by_one_thread_at_a_time(
    owner: OwnersFolder, fake: type[FakeWorker], others: type[FakePeers]
) -> None:
    worker, serving = serving_worker(owner, fake)
    others.going_on.clear()
    place = AdapterPlace(TENANT, THEN, "10.0.0.6:7444")
    ask(worker, Delivery(adapters=(place,)))
    ask(worker, Delivery(adapters=(place,), next_stage="x:1"))
    others.going_on.set()
    eventually(lambda: bool(serving.taken) and not worker._copying)
    assert len(others.asked) == 1
    ask(worker, Delivery(adapters=(AdapterPlace(TENANT, THEN + 1, "10.0.0.6:7444"),)))
    eventually(lambda: len(serving.taken) == 2)


# Two real workers -----------------------------------------------------------------------------------------------------


def test_a_worker_serves_edges_and_the_next_one_gets_model_and_adapters_from_it(
    owner: OwnersFolder, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but Ray is real: keys, certificates, servers, the sealed fetches between the two."""
    monkeypatch.setattr(node_worker, "node_address", lambda: "127.0.0.1")
    with contextlib.closing(Ports()) as ports:
        places = [ports.take("127.0.0.1:0") for _ in range(2)]
        listens = [f"node:{int(place.rpartition(':')[2]) - number}" for number, place in enumerate(places)]
        here = spec_of(owner, model, listen=listens[0])
        without = dataclasses.replace(here.worker, checkpoint="/nowhere", number=1, listen=listens[1])
        first = NodeWorker(here)
        edge = generate_edge(tmp_path / "id", "alice")
        ask(first, Delivery(certificate(owner, first), f"{edge}\n"))
        assert settled(first).failure == ""
        link = connect(
            str(ConnectionString("127.0.0.1", int(places[0].rpartition(":")[2]), owner.pin)), key=tmp_path / "id"
        )
        with link:
            assert link.forward_span(hidden(), None, None, keep=False)[0].shape == hidden().shape
        package = tiny_package(tmp_path / "package", model)
        adapter = tuned(package, tmp_path / "adapter", on_package=False)
        tenant = Fingerprint.of(load_edge(tmp_path / "id").public_key().public_bytes_raw()).digest.hex()
        expected = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in adapter.glob("adapter_*")}
        first._worker.take_adapter(tenant, THEN, {path.name: path for path in adapter.glob("adapter_*")})

        second = NodeWorker(dataclasses.replace(here, worker=without))
        line = f"{STAGE_OPTIONS} {format_public_key(ask(second).key, 'worker-1@cloud')}"
        ask(first, Delivery(certificate(owner, first), f"{edge}\n{line}\n"))
        held = ask(first).adapters
        assert held == {tenant: THEN}
        place = AdapterPlace(tenant, THEN, ask(first).place)
        ask(second, Delivery(certificate(owner, second), f"{edge}\n"))
        eventually(lambda: ask(second).waits.startswith("waiting for a worker that has the model"))
        ask(second, Delivery(certificate(owner, second), f"{edge}\n", models_at=(ask(first).place,)))
        report = settled(second)
        assert (report.failure, report.has_model) == ("", True)
        ask(second, Delivery(certificate(owner, second), f"{edge}\n", adapters=(place,)))
        eventually(lambda: ask(second).adapters == held, 60)
        shelf = second._worker._adapters.shared_files().listing().entries
        assert {entry.name.removeprefix(adapter_prefix(tenant, THEN)): entry.sha256 for entry in shelf} == expected
        stranger = ConnectionString("127.0.0.1", int(places[1].rpartition(":")[2]), owner.pin)
        generate_edge(tmp_path / "stranger", "mallory")
        with pytest.raises(NotEnrolledError):
            connect(str(stranger), key=tmp_path / "stranger")
        assert first.drain(5.0)
        assert second.drain(5.0)
