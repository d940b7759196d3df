"""Workers on a node, asked as a controller asks them, and one that serves without a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from support.cloud.sessions import eventually
from support.cluster.owners_folder import OwnersFolder

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.cloud.control.worker import WorkerSpec
from isthmus.cloud.directory import Peer, Report, Update
from isthmus.cloud.nodes.deliveries import Delivery, NodeReport
from isthmus.cloud.nodes.node_worker import NodeSpec, NodeWorker
from isthmus.protocol.secure.keys import load_issuer


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

    max_adapter_bytes = 1 << 20

    def metrics(self) -> bytes:
        return b"positions 0\n"

    def drain(self, grace: float) -> bool:
        self.graces.append(grace)
        return False


def ask(worker: NodeWorker, delivery: Delivery | None = None, update: Update | None = None) -> NodeReport:
    return worker.exchange(update or Update(), delivery)


def certificate(owner: OwnersFolder, worker: NodeWorker) -> str:
    issuer = load_issuer(owner.folder)
    return issuer.issue(ask(worker).key, issuer.certificate.not_after).to_json()


def settled(worker: NodeWorker) -> NodeReport:
    """Its report once it serves, or has failed."""
    eventually(lambda: not ask(worker).waits or bool(ask(worker).failure), 60)
    return ask(worker)
