"""Adapters that a worker on a node gets from others, of its model too; two real workers do both."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import pytest
from support.cloud.sessions import eventually, hidden
from support.cluster.node_workers import FakeWorker, ask, certificate, settled, spec_of
from support.cluster.owners_folder import OwnersFolder
from support.emulator.packages import tiny_package, tuned

from isthmus.cloud.control.ports import Ports
from isthmus.cloud.nodes import node_worker
from isthmus.cloud.nodes.deliveries import AdapterPlace, Delivery
from isthmus.cloud.nodes.node_worker import NodeWorker
from isthmus.common.errors import ConnectionLostError, NotEnrolledError
from isthmus.edge.client.link import connect
from isthmus.emulator.package.intake import ADAPTER_FILES
from isthmus.emulator.package.offered_files import adapter_prefix
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import STAGE_OPTIONS, ConnectionString
from isthmus.protocol.secure.keys import Fingerprint, format_public_key, generate_edge, load_edge

TENANT, THEN = "ab" * 32, 1_700_000_000_123

pytestmark = pytest.mark.usefixtures("node", "on_a_node")


class FakePeers:
    """Other workers; those in `gone` do not answer."""

    gone: ClassVar[set[str]] = set()
    asked: ClassVar[list[tuple[str, m.FileSet]]] = []
    going_on = threading.Event()

    def __init__(self, pin: Fingerprint, key: object) -> None:
        self.pin = pin

    async def fetch_named(
        self, address: str, file_set: m.FileSet, names: Iterable[str], folder: Path, most: int
    ) -> list[str]:
        assert most == FakeWorker.max_adapter_bytes
        FakePeers.going_on.wait(30)
        FakePeers.asked.append((address, file_set))
        if address in FakePeers.gone:
            raise ConnectionLostError("it is gone")
        there = [f"{adapter_prefix(TENANT, at)}adapter_config.json" for at in (THEN, THEN + 1)]
        taken = [name for name in names if name in there]
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


def test_an_adapter_that_was_delivered_while_the_model_loads_is_copied_then(
    owner: OwnersFolder, fake: type[FakeWorker], others: type[FakePeers], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = threading.Event()

    def find_model(self: NodeWorker, home: object) -> Path:
        assert loads.wait(30)
        return Path("/models/found")

    monkeypatch.setattr(NodeWorker, "_find_model", find_model)
    worker = NodeWorker(spec_of(owner))
    delivery = Delivery(certificate(owner, worker), adapters=(AdapterPlace(TENANT, THEN, "10.0.0.6:7444"),))
    assert ask(worker, delivery).revision == delivery.revision  # so that it is not sent again
    loads.set()
    settled(worker)
    eventually(lambda: ask(worker).adapters == {TENANT: THEN})


@pytest.mark.parametrize("trouble", ["source", "disk"])
def test_a_copy_that_failed_is_tried_again_after_a_pause(
    owner: OwnersFolder,
    fake: type[FakeWorker],
    others: type[FakePeers],
    node: Path,
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(node_worker, "log", lambda event, *_, **fields: said.append(event))
    monkeypatch.setattr(node_worker, "COPY_PAUSE_SECONDS", 1e9)
    worker, serving = serving_worker(owner, fake)
    (folder,) = node.glob("cloud-*/worker-0")
    if trouble == "source":
        others.gone.add("10.0.0.6:7444")
    else:
        (folder / "copies").write_text("no folder can be made here")
    ask(worker, Delivery(adapters=(AdapterPlace(TENANT, THEN, "10.0.0.6:7444"),)))
    eventually(lambda: bool(said) and not worker._copying)
    others.gone.clear()
    if trouble == "disk":
        (folder / "copies").unlink()
    ask(worker)
    assert not worker._copying
    assert (said, serving.taken) == (["adapter_not_copied"], [])
    monkeypatch.setattr(node_worker, "COPY_PAUSE_SECONDS", 0.0)
    eventually(lambda: ask(worker).adapters == {TENANT: THEN})


def test_an_adapter_that_is_refused_again_and_again_is_fetched_ever_more_rarely() -> None:
    pauses = [node_worker._pause(times) for times in range(1, 10)]
    assert pauses[:3] == [10.0, 20.0, 40.0]
    assert pauses[-1] == pauses[-2] == 640.0


def test_a_copy_from_elsewhere_does_not_wait_for_one_that_failed(
    owner: OwnersFolder, fake: type[FakeWorker], others: type[FakePeers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_worker, "COPY_PAUSE_SECONDS", 1e9)
    worker, _ = serving_worker(owner, fake)
    others.gone.add("10.0.0.6:7444")
    ask(worker, Delivery(adapters=(AdapterPlace(TENANT, THEN, "10.0.0.6:7444"),)))
    eventually(lambda: bool(others.asked) and not worker._copying)
    ask(worker, Delivery(adapters=(AdapterPlace(TENANT, THEN, "10.0.0.7:7445"),)))
    eventually(lambda: ask(worker).adapters == {TENANT: THEN} and not worker._copying)
    assert list(worker._tried) == [AdapterPlace(TENANT, THEN, "10.0.0.7:7445")]  # no more than was delivered last


def test_one_that_always_fails_takes_turns_with_others_until_the_worker_ends(
    owner: OwnersFolder, fake: type[FakeWorker], others: type[FakePeers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempts that take longer than the pause: the first one is due again when the next one's turn comes."""
    monkeypatch.setattr(node_worker, "COPY_PAUSE_SECONDS", 0.0)
    worker, serving = serving_worker(owner, fake)
    others.gone.add("10.0.0.6:7444")
    places = (AdapterPlace("cd" * 32, THEN, "10.0.0.6:7444"), AdapterPlace(TENANT, THEN, "10.0.0.7:7445"))
    ask(worker, Delivery(adapters=places))
    eventually(lambda: bool(serving.taken))
    worker.drain(0.0)
    eventually(lambda: not worker._copying)
    ask(worker, Delivery(adapters=places[::-1]))
    assert not worker._copying


def test_what_is_delivered_during_a_copy_is_copied_after_it(
    owner: OwnersFolder, fake: type[FakeWorker], others: type[FakePeers]
) -> None:
    worker, _ = serving_worker(owner, fake)
    others.going_on.clear()
    ask(worker, Delivery(adapters=(AdapterPlace(TENANT, THEN, "10.0.0.6:7444"),)))
    ask(worker, Delivery(adapters=(AdapterPlace(TENANT, THEN + 1, "10.0.0.7:7445"),)))
    others.going_on.set()
    eventually(lambda: ask(worker).adapters == {TENANT: THEN + 1})


@pytest.mark.parametrize("held", [THEN, THEN + 1])
def test_an_adapter_that_is_here_already_is_not_fetched(
    owner: OwnersFolder, fake: type[FakeWorker], others: type[FakePeers], held: int
) -> None:
    """A controller that has heard nothing of a worker that settles delivers all adapters that there are."""
    worker, serving = serving_worker(owner, fake)
    serving.held[TENANT] = held
    ask(worker, Delivery(adapters=(AdapterPlace(TENANT, THEN, "10.0.0.6:7444"),)))
    assert not worker._copying
    assert others.asked == []


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
        files = {path.name: path for path in adapter.iterdir() if path.name in ADAPTER_FILES}
        expected = {name: hashlib.sha256(path.read_bytes()).digest() for name, path in files.items()}
        first._worker.take_adapter(tenant, THEN, files)

        second = NodeWorker(dataclasses.replace(here, worker=without))
        line = f"{STAGE_OPTIONS} {format_public_key(ask(second).key, 'worker-1')}"
        ask(first, Delivery(certificate(owner, first), workers=f"{line}\n"))  # and the tenants that it has
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
