"""The worker of a cloud over several machines: a Ray actor that may be started, and started again, on any node.

It is *settling* until it has a certificate and its model, then it serves as a worker of one machine does. The
controller's rounds of questions drive it; it asks Ray for nothing but its node's address, once. So nothing of its data
plane waits for Ray's control store.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import resource
import shutil
import socket
import threading
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from isthmus.cloud.control.ports import parse_address
from isthmus.cloud.control.ray_cluster import node_address
from isthmus.cloud.control.worker import REBINDS, Worker, WorkerSpec
from isthmus.cloud.directory import Report, Update
from isthmus.cloud.nodes.deliveries import AdapterPlace, Delivery, NodeReport
from isthmus.cloud.nodes.worker_home import NEXT_STAGE, WorkerHome
from isthmus.cloud.telemetry.logs import log, log_file, log_to
from isthmus.common.errors import IsthmusError
from isthmus.common.machine import threads_each, usable_cores
from isthmus.common.readable import bracketed
from isthmus.protocol.secure.keys import Fingerprint

SETTLING = "starting"
"""The state of a worker that is not serving yet, for the operator."""
WAIT_SECONDS = 0.05
"""Between two looks at what was delivered, while a worker settles."""
COPY_PAUSE_SECONDS = 10.0
"""Between two attempts to copy an adapter: a full disk lasts, and so does a source that is busy or does not answer."""
COPY_DOUBLINGS = 6
"""How often that pause is doubled, up to eleven minutes: an adapter that is refused each time is fetched each time."""
IN_PART = "in part"
"""The revision where a delivery was kept in part: no delivery's, so that even the one before it is sent again."""
ANY_HOST, NODE_HOST = ("0.0.0.0", "[::]"), "node"  # noqa: S104  # compared only
"""Hosts of `--listen` on a cluster: every interface of a node, or its address in the cluster alone."""


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """All that a worker needs to start on any node. Ray keeps this in its control store: nothing in it is secret.

    Attributes:
        cloud: the cloud's name.
        root: digest of the fingerprint of the cloud's root key.
        worker: as on one machine, with 0 threads for a share of the node's cores. Paths are those of the node where
            the cloud's owner is, and other nodes may have them too. `listen` is the base address, to whose port the
            worker's number is added.
        digest: SHA-256 (hex) of the model.
        hub: the model's name on the hub, with its revision; "" where it is not from there.
        parts: name of the folder with the edge's parts.
        advertise: host at which edges reach whichever worker, all on the base port: a load balancer, before nodes with
            one worker each. "" for each worker's own address, and its own port.
        inner: whether it is a stage that edges do not talk to.
        last: whether no stage comes behind it.
    """

    cloud: str
    root: bytes
    worker: WorkerSpec
    digest: str
    hub: str
    parts: str
    advertise: str = ""
    inner: bool = False
    last: bool = True


def spec_digest(spec: NodeSpec) -> str:
    """SHA-256 (hex) of a specification, by which a controller tells workers that were made with another one.

    It leaves out what may differ where the same is served: `beside`, which follows from the nodes that were alive, and
    the owner's paths, in whose place a worker has its node's own. What is in the checkpoint is in `digest`.
    """
    fields = dataclasses.asdict(spec)
    for name in ("beside", "checkpoint", "parts", "home", "log_file"):
        del fields["worker"][name]
    return sha256(json.dumps(fields, sort_keys=True, default=bytes.hex).encode()).hexdigest()


def _pause(times: int) -> float:
    """Seconds until an adapter whose copy was tried so often is tried again."""
    return COPY_PAUSE_SECONDS * 2.0 ** min(max(times - 1, 0), COPY_DOUBLINGS)


class NodeWorker:
    """One worker on some node. Made into an actor by `isthmus.cloud.cluster.cluster_controller`."""

    def __init__(self, spec: NodeSpec) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold activations and keys
        self._spec, self._number = spec, spec.worker.number
        host, port = parse_address(spec.worker.listen)
        self._node = node_address()
        own = bracketed(self._node)
        own_port = port if spec.advertise else port + self._number
        self._listen = f"{host if host in ANY_HOST else own}:{own_port}"
        self._place = f"{own}:{own_port}"
        self._address = f"{spec.advertise}:{port}" if spec.advertise and not spec.inner else self._place
        self._lock = threading.Lock()
        self._delivery, self._revision = Delivery(), ""
        self._restarts = 0
        self._home: WorkerHome | None = None
        self._worker: Worker | None = None
        self._waits, self._failure = "its certificate", ""
        self._has_model = False
        self._fault, self._digest = "", spec_digest(spec)
        self._copying = self._draining = False
        self._tried: dict[AdapterPlace, tuple[float, int]] = {}  # when a copy was tried last, and how often in all
        try:
            self._home = WorkerHome((spec.cloud, spec.root), self._number)
            log_to(log_file(self._home.folder, "worker", self._number))
        except IsthmusError as error:
            self._failure = str(error)
            return
        threading.Thread(target=_import_heavy, name="imports", daemon=True).start()  # beside what is asked for
        threading.Thread(target=self._settle, name="settling", daemon=True).start()

    # What the controller asks -----------------------------------------------------------------------------------------

    def exchange(self, update: Update, delivery: Delivery | None) -> NodeReport:
        """Take the controller's update, and what is new for this worker; report of it."""
        if delivery is not None:
            self._take(delivery)
        if update.restarts is not None:
            self._restarts = update.restarts
        home = self._home
        worker = self._worker
        report = worker.exchange(update) if worker is not None else Report(self._settling_status(), None)
        if home is not None and worker is not None:
            self._copy_adapters(home, worker)
        with self._lock:
            revision, fault = self._revision, self._fault
        return NodeReport(
            report,
            b"" if home is None else home.public_key,
            f"{socket.gethostname()} ({self._node})",
            self._place,
            None if home is None else home.request(),
            home is not None and home.wants_certificate,
            revision,
            self._has_model,
            {} if worker is None else worker.adapters_held(),
            "" if worker is not None else self._waits,
            self._failure,
            fault,
            self._digest,
        )

    def metrics(self) -> bytes:
        """The worker's metrics in Prometheus' text format; none while it settles."""
        return b"" if self._worker is None else self._worker.metrics()

    def drain(self, grace: float) -> bool:
        """Finish the calls in flight and stop listening."""
        self._draining = True
        return self._worker is None or self._worker.drain(grace)

    # What it does by itself -------------------------------------------------------------------------------------------

    def _take(self, delivery: Delivery) -> None:
        home = self._home
        if home is None:
            return
        try:
            home.write(delivery)
        except IsthmusError as error:
            fault = f"what the controller sends cannot be kept: {error}"
            if fault != self._fault:  # it is sent again at every round
                log("delivery_not_written", logging.ERROR, error=str(error))
            with self._lock:
                self._fault, self._revision = fault, self._revision and IN_PART
            return
        with self._lock:
            self._delivery, self._revision, self._fault = delivery, delivery.revision, ""

    def _settle(self) -> None:
        """Get everything that a worker of one machine has in its home, then serve."""
        home, spec = self._home, self._spec
        if home is None:
            return
        try:
            while not home.is_certified:
                time.sleep(WAIT_SECONDS)
            self._waits = "its model"
            folder = self._find_model(home)
            self._has_model = not spec.worker.saved_span
            self._waits = "its layers to be loaded"
            self._worker = Worker(self._worker_spec(home, folder), rebinds=REBINDS)
            self._worker.port()  # raises what has kept it from serving
        except IsthmusError as error:
            log("worker_not_started", logging.ERROR, error=str(error))
            self._failure, self._worker = str(error), None
        except Exception as error:  # the operator has to see it: the thread has nobody to tell
            log("worker_not_started", logging.ERROR, error=f"{type(error).__name__}: {error}")
            self._failure, self._worker = f"{type(error).__name__}: {error}", None
            raise

    def _find_model(self, home: WorkerHome) -> Path:
        from isthmus.cloud.nodes.node_models import NodeModel, find_model
        from isthmus.cloud.nodes.peers import Peers

        spec = self._spec
        if spec.worker.saved_span:  # which is of several folders: on a path that all nodes share
            return Path(spec.worker.checkpoint)
        model = NodeModel(spec.worker.model, spec.worker.checkpoint, spec.digest, spec.hub)
        peers = Peers(Fingerprint(spec.root), home.key)

        def models_at() -> tuple[str, ...]:
            with self._lock:
                return self._delivery.models_at

        def say(what: str) -> None:
            self._waits = what

        return find_model(model, peers, models_at, say)

    def _worker_spec(self, home: WorkerHome, model: Path) -> WorkerSpec:
        from isthmus.backbone.checkpoints.sources import default_cache

        spec = self._spec
        parts = model if spec.parts == "" else default_cache().absolute() / "edge-parts" / spec.parts
        return dataclasses.replace(
            spec.worker,
            threads=spec.worker.threads or threads_each(usable_cores(), spec.worker.beside),
            checkpoint=str(model),
            parts=str(parts),
            home=str(home.folder),
            listen=self._listen,
            address=self._address,
            log_file=str(log_file(home.folder, "worker", self._number)),
            edges=str(home.folder) if spec.inner else "",
            next_stage="" if spec.last else str(home.folder / NEXT_STAGE),
            next_key="",
            shares_model=self._has_model,
        )

    def _copy_adapters(self, home: WorkerHome, worker: Worker) -> None:
        """Have a thread copy what is newer elsewhere, where there is something to try now and no thread does it yet.

        Each round asks, not each delivery: a worker may have got the delivery while it settled, or have failed to copy.
        """
        with self._lock:  # a controller and the one that takes its place may ask at a time
            if self._copying or self._next_copy(worker) is None:
                return
            self._copying = True
        threading.Thread(target=self._copy, args=(home, worker), name="adapters", daemon=True).start()

    def _next_copy(self, worker: Worker) -> AdapterPlace | None:
        """The adapter to copy now: delivered as one that is newer than that here, and not tried of late."""
        places = self._delivery.adapters
        if self._draining or not places:
            return None
        held, now = worker.adapters_held(), time.monotonic()
        tried = {place: self._tried.get(place, (float("-inf"), 0)) for place in places}
        newer = [place for place in places if place.plugged_at > held.get(place.tenant, 0)]
        due = [place for place in newer if tried[place][0] + _pause(tried[place][1]) <= now]
        return min(due, key=lambda place: tried[place][0], default=None)  # one that fails keeps no other waiting

    def _copy(self, home: WorkerHome, worker: Worker) -> None:
        """Fetch tenants' adapters that were plugged in elsewhere, one after the other, until there is none to try."""
        from isthmus.cloud.nodes.peers import Peers
        from isthmus.emulator.package.intake import ADAPTER_FILES
        from isthmus.emulator.package.offered_files import adapter_prefix
        from isthmus.protocol.messages import FileSet

        try:
            peers = Peers(Fingerprint(self._spec.root), home.key)
            while (place := self._next_copy(worker)) is not None:
                prefix = adapter_prefix(place.tenant, place.plugged_at)
                names = [f"{prefix}{name}" for name in sorted(ADAPTER_FILES)]
                folder = home.folder / "copies" / f"{place.tenant}-{place.plugged_at}"
                try:
                    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                    fetching = peers.fetch_named(
                        place.address, FileSet.ADAPTERS, names, folder, worker.max_adapter_bytes
                    )
                    if fetched := asyncio.run(fetching):  # not on the loop of the data plane, which serves edges
                        worker.take_adapter(
                            place.tenant, place.plugged_at, {name[len(prefix) :]: folder / name for name in fetched}
                        )
                except (IsthmusError, OSError) as error:
                    log("adapter_not_copied", logging.WARNING, at=place.address, error=str(error))
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
                    delivered = self._delivery.adapters
                    self._tried = {each: at for each, at in self._tried.items() if each in delivered}
                    self._tried[place] = time.monotonic(), self._tried.get(place, (0.0, 0))[1] + 1
        finally:
            self._copying = False

    def _settling_status(self) -> dict[str, Any]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "worker": self._number,
            "address": self._address,
            "state": SETTLING,
            "waits": self._failure or self._waits,
            "positions": 0,
            "restarts": self._restarts,
            "pid": os.getpid(),
            "peak_bytes": usage.ru_maxrss * 1024,
        }


def _import_heavy() -> None:
    """Import what takes seconds, while a worker waits for its certificate."""
    import isthmus.cloud.control.worker_setup
    import isthmus.cloud.gateway.server  # noqa: F401
