"""The worker: a Ray actor that holds one span and runs one data plane.

Ray restarts it when its process dies. The server is started from `__init__`, so a restarted worker is back on the same
port without anybody calling it; the edges reconnect by themselves. Activations never enter Ray's object store.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from isthmus.cloud.bounds import Bounds
from isthmus.cloud.control.ray_cluster import was_restarted
from isthmus.cloud.directory import Peer, Report, Update
from isthmus.cloud.engine.freed_memory import check_wiping
from isthmus.cloud.telemetry.logs import log, log_to
from isthmus.common.errors import ConfigError, IsthmusError, PortInUseError
from isthmus.protocol.limits import MIB

if TYPE_CHECKING:
    from isthmus.cloud.gateway.server import ServerTls


CPU, CUDA = "cpu", "cuda"
DEVICES = (CPU, CUDA)
REBINDS, REBIND_PAUSE = 5, 1.0
"""Further attempts to take a port that the process before this one may still hold, and the seconds between two."""
RESTART_PAUSE = 5.0
"""Seconds before a worker that could not be started again ends: Ray tries at once, and its cause may pass."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """All that a worker needs to start, and to start again. Paths, not secrets: Ray keeps this in its control store."""

    checkpoint: str  # folder: the whole model, or the edge's parts beside a saved span
    model: str  # the name that edges get
    plan: str
    dtype: str
    parts: str  # folder of the edge's parts, which the first worker makes
    home: str  # folder with worker_key, worker_cert, authorized_edges and the tenants' adapters
    listen: str
    stash_bytes: int | None  # budget of the activation cache; None for a fifth of what the machine has
    max_tokens: int
    threads: int
    log_file: str  # "" for standard error
    tls_cert: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    emulators: tuple[tuple[str, str], ...] = ()  # name and folder of each package that is offered
    sites: bool = True
    quantize: str = "none"
    saved_span: str = ""  # folder that `isthmus cloud quantize` wrote; "" for none
    device: str = CPU  # where the span computes, one of `DEVICES`
    number: int = 0  # of the worker, from 0 on
    address: str = ""  # host:port that edges get
    layers: str = ""  # start:stop of a pipeline's stage; "" for all of the plan's
    edges: str = ""  # folder with the authorized_edges of a stage that no edge talks to; "" for that in the home
    next_stage: str = ""  # host:port of the pipeline's next stage, or a file that has it; "" for none
    compute_bytes: int | None = None  # budget of calls that are computed; None as above
    beside: int = 1  # workers that share this machine's memory
    next_key: str = ""  # file with the key that the next stage has enrolled; "" for the worker's own
    record: str = ""  # folder of the recording; "" for none
    record_bytes: int = 0  # that it takes at most
    wipe_freed: bool = False  # whether it must overwrite what it frees
    shares_model: bool = False  # whether the cloud's other workers may fetch the checkpoint
    bounds: Bounds = field(default_factory=Bounds)  # limits on what others can make it hold


class Worker:
    """One span behind one gRPC server. Made into an actor by `isthmus.cloud.control.cluster`.

    Ray imports this module in every process with a handle of the actor, so torch is imported only in `_start`.

    Args:
        spec: what it serves.
        rebinds: further attempts to take a port; by default `REBINDS` where Ray says that this actor was restarted.
    """

    def __init__(self, spec: WorkerSpec, *, rebinds: int | None = None) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold activations and keys
        self._failure: IsthmusError | None = None
        restarted = rebinds is None and was_restarted()
        try:
            self._start(spec, rebinds if rebinds is not None else REBINDS if restarted else 0)
        except IsthmusError as error:
            self._failure = error  # raised by `port`: of an actor that dies in its constructor, Ray keeps only a text
            if restarted:  # nobody calls `port` again, so this process would stay and listen to nothing
                log("restart_failed", logging.ERROR, error=str(error))
                time.sleep(RESTART_PAUSE)
                os._exit(1)  # Ray tries again

    def _start(self, spec: WorkerSpec, rebinds: int) -> None:
        from isthmus.cloud.control.worker_setup import edges_of, next_stage_of, recorder_of, served_by, tls_of
        from isthmus.cloud.gateway.server import GatewayServer
        from isthmus.cloud.home.identity import IdentityFiles

        self._spec, self._restarts = spec, 0
        log_to(Path(spec.log_file) if spec.log_file else None)
        if spec.wipe_freed:
            check_wiping()
        served = served_by(spec)
        self._adapters = served.adapters
        self._span = str(served.executor.host.span.layer_span)
        identity, edges = IdentityFiles(Path(spec.home)), edges_of(spec)
        self._server = GatewayServer(
            served,
            identity,
            edges,
            spec.threads,
            next_stage_of(spec),
            bounds=spec.bounds,
            recorder=recorder_of(spec),
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="data-plane", daemon=True).start()
        self._port = self._listen(spec.listen, tls_of(spec), rebinds)

    def _listen(self, listen: str, tls: ServerTls | None, rebinds: int) -> int:
        """Listen; a restarted worker tries again, as the process before it may hold the port for a moment more."""
        for left in range(rebinds, -1, -1):
            try:
                return asyncio.run_coroutine_threadsafe(self._server.start(listen, tls), self._loop).result()
            except PortInUseError as error:
                if not left:
                    raise
                log("port_still_taken", logging.WARNING, error=str(error))
                time.sleep(REBIND_PAUSE)
        raise ValueError(f"{rebinds} further attempts to listen cannot be made: 0 or more is needed")

    def port(self) -> int:
        """The port that the worker listens on; answering means that it is ready.

        Raises IsthmusError where it could not start.
        """
        if self._failure is not None:
            raise self._failure
        return self._port

    def budgets(self) -> str:
        """A line on the memory that states, caches and calls may take. Raises IsthmusError where it could not start."""
        self.port()
        status = self._server.status()
        return (
            f"worker {self._spec.number}: {status['stash_budget_bytes'] / MIB:.0f} MiB for forward states, "
            f"{status['cache_budget_bytes'] / MIB:.0f} MiB for keys and values, "
            f"{status['compute_budget_bytes'] / MIB:.0f} MiB for calls while they are computed and as much for calls "
            f"that have paused; at most {self._spec.max_tokens} tokens in a call"
        )

    def exchange(self, update: Update) -> Report:
        """Take the controller's update, and report of this worker. Raises IsthmusError where it could not start."""
        self.port()
        spec = self._spec
        if update.restarts is not None:
            self._restarts = update.restarts
        self._loop.call_soon_threadsafe(self._server.sessions.take_report, spec.address, update.peers)
        if update.end_newest:
            self._loop.call_soon_threadsafe(self._server.sessions.end_newest, update.end_newest)
        status = self._server.status()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        own = {
            "worker": spec.number,
            "address": spec.address,
            "span": self._span,
            **status,
            "positions": self._server.metrics.positions(),
            "restarts": self._restarts,
            "pid": os.getpid(),
            "peak_bytes": usage.ru_maxrss * 1024,
        }
        if spec.edges:  # a stage inside a pipeline, which edges do not talk to
            return Report(own, None)
        return Report(own, Peer(spec.address, str(status["state"]), self._server.sessions.entries()))

    def adapters_held(self) -> dict[str, int]:
        """When each tenant's adapter was plugged in; see `AdapterStore.held`."""
        return self._adapters.held()

    def take_adapter(self, tenant: str, plugged_at: int, files: Mapping[str, Path]) -> None:
        """Plug in a copy of what another worker has plugged in; see `AdapterStore.take`."""
        self._adapters.take(tenant, plugged_at, files)

    @property
    def max_adapter_bytes(self) -> int:
        """Most bytes of one adapter."""
        return self._adapters.max_bytes

    def metrics(self) -> bytes:
        """The worker's metrics in Prometheus' text format. Raises IsthmusError where it could not start."""
        self.port()
        return self._server.metrics.text()

    def drain(self, grace: float) -> bool:
        """Finish the calls in flight and stop listening."""
        return asyncio.run_coroutine_threadsafe(self._server.drain(grace), self._loop).result()


def no_gpu(device: str) -> ConfigError:
    """The error of a machine without a GPU."""
    return ConfigError(
        f"--device {device} needs a GPU that torch finds, and it finds none: check the driver and that torch is "
        "built with CUDA, or leave the option out"
    )
