"""A worker on a node, driven by a controller's questions: what it waits for, where it listens, what it fetches."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cloud.sessions import eventually
from support.cluster.node_workers import FakeWorker, ask, certificate, settled, spec_of
from support.cluster.owners_folder import OwnersFolder

from isthmus.backbone.checkpoints.sources import default_cache
from isthmus.cloud.bounds import EngineOptions
from isthmus.cloud.control.worker import WorkerSpec
from isthmus.cloud.directory import Peer, Update
from isthmus.cloud.nodes import node_worker, worker_home
from isthmus.cloud.nodes.deliveries import Delivery
from isthmus.cloud.nodes.node_worker import NodeSpec, NodeWorker, spec_digest
from isthmus.common.errors import PortInUseError
from isthmus.common.files import disk_errors, write_atomic

pytestmark = pytest.mark.usefixtures("node", "on_a_node")


@contextlib.contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, *, but_for: str = "") -> Iterator[None]:
    """No file can be written, but for those of a name."""

    def write(path: Path, data: bytes, mode: int = 0o644) -> None:
        with disk_errors(path):
            if path.name != but_for:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_atomic(path, data, mode)

    with monkeypatch.context() as patched:
        patched.setattr(worker_home, "write_atomic", write)
        yield


# What it was made with ------------------------------------------------------------------------------------------------


def changed(spec: NodeSpec, **changes: Any) -> NodeSpec:
    return dataclasses.replace(spec, worker=dataclasses.replace(spec.worker, **changes))


def test_a_digest_tells_of_whatever_is_served_otherwise(owner: OwnersFolder) -> None:
    spec = spec_of(owner)
    bounds = dataclasses.replace(spec.worker.bounds, engine=EngineOptions(max_wait=1.0))
    others = [
        *(changed(spec, **{name: value}) for name, value in (("model", "other"), ("plan", "1:1"), ("number", 1))),
        *(changed(spec, **{name: value}) for name, value in (("quantize", "int8"), ("wipe_freed", True))),
        changed(spec, saved_span="/shared/span"),
        changed(spec, bounds=bounds),
        dataclasses.replace(spec, digest="11" * 32),
        dataclasses.replace(spec, root=bytes(32)),
        dataclasses.replace(spec, advertise="lb"),
    ]
    assert len({spec_digest(each) for each in (spec, *others)}) == 1 + len(others)


def test_a_digest_is_of_what_is_served_wherever_the_owner_is_and_whichever_nodes_are_alive(
    owner: OwnersFolder,
) -> None:
    spec = spec_of(owner)
    assert spec_digest(changed(spec, beside=9)) == spec_digest(spec)
    elsewhere = {name: f"/home/bob/{name}" for name in ("checkpoint", "parts", "home", "log_file")}
    assert spec_digest(changed(spec, **elsewhere)) == spec_digest(spec)


def test_a_digest_is_the_same_in_every_process_and_reported(owner: OwnersFolder, fake: type[FakeWorker]) -> None:
    spec = spec_of(owner)
    code = (
        "import json, sys; from isthmus.cloud.control.worker import WorkerSpec; "
        "from isthmus.cloud.nodes.node_worker import NodeSpec, spec_digest; "
        "given = json.load(sys.stdin); given |= {'root': bytes.fromhex(given['root'])}; "
        "print(spec_digest(NodeSpec(**(given | {'worker': WorkerSpec(**given['worker'])}))))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(dataclasses.asdict(spec), default=bytes.hex).encode(),
        env={**os.environ, "PYTHONHASHSEED": "7"},
        stdout=subprocess.PIPE,
        check=True,
    )
    assert other.stdout.decode().strip() == spec_digest(spec) == ask(NodeWorker(spec)).spec


# Settling -------------------------------------------------------------------------------------------------------------


def test_a_worker_asks_for_a_certificate_and_then_serves(owner: OwnersFolder, fake: type[FakeWorker]) -> None:
    worker = NodeWorker(spec_of(owner))
    report = ask(worker)
    assert (report.waits, report.failure, report.revision) == ("its certificate", "", "")
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
    assert ask(worker, delivery).revision == ""
    away.rename(folder)
    assert ask(worker, delivery).revision == delivery.revision
    settled(worker)
    assert len(fake.made) == 1


def test_a_full_disk_is_told_to_the_operator_until_a_delivery_is_kept(
    owner: OwnersFolder, fake: type[FakeWorker], node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(node_worker, "log", lambda event, *_, **fields: said.append(event))
    worker = NodeWorker(spec_of(owner))
    assert ask(worker).fault == ""
    edges = node / f"cloud-{owner.pin.digest.hex()[:12]}" / "worker-0" / "authorized_edges"
    with full_disk(monkeypatch):
        for _ in range(2):
            assert ask(worker, Delivery(authorized_edges="# nobody\n")).fault == (
                f"what the controller sends cannot be kept: {edges} cannot be written (No space left on device): "
                "free some space or choose another folder; what was saved before is untouched."
            )
        assert said == ["delivery_not_written"]
        assert ask(worker).fault  # nothing new came, so nothing is better
    assert ask(worker, Delivery(authorized_edges="# nobody\n")).fault == ""
    with full_disk(monkeypatch):
        assert ask(worker, Delivery(authorized_edges="# somebody\n")).fault
    assert said == ["delivery_not_written"] * 2


def test_after_a_delivery_that_was_kept_in_part_the_one_before_it_is_sent_again(
    owner: OwnersFolder, fake: type[FakeWorker], node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = NodeWorker(spec_of(owner))
    before = Delivery(authorized_edges="# alice\n", workers="# one\n")
    after = Delivery(authorized_edges="# bob\n", workers="# two\n")
    assert ask(worker, before).revision == before.revision
    home = node / f"cloud-{owner.pin.digest.hex()[:12]}" / "worker-0"
    with full_disk(monkeypatch, but_for="authorized_edges"):
        assert ask(worker, after).fault
    assert [(home / name).read_text() for name in ("authorized_edges", "authorized_workers")] == ["# bob\n", "# one\n"]
    assert ask(worker).revision not in ("", before.revision, after.revision)
    report = ask(worker, before)
    assert (report.revision, report.fault) == (before.revision, "")
    assert (home / "authorized_edges").read_text() == "# alice\n"


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
