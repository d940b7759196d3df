"""The worker: a Ray actor that holds one span and runs one data plane.

Ray restarts it when its process dies. The server is started from `__init__`, so a restarted worker is back on the same
port without anybody calling it; the edges reconnect by themselves. Activations never enter Ray's object store.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import resource
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from isthmus.backbone.errors import ConfigError, IsthmusError
from isthmus.backbone.families import family_of
from isthmus.backbone.plan import Span, SplitPlan
from isthmus.backbone.quantize import NONE, quantizer_of
from isthmus.backbone.saved_span import load_saved_span
from isthmus.backbone.site_host import SiteHost
from isthmus.backbone.sources import Checkpoint
from isthmus.backbone.span import DTYPES, load_span
from isthmus.cloud.adapters import AdapterStore
from isthmus.cloud.directory import Peer, Report, Word
from isthmus.cloud.executor import Executor
from isthmus.cloud.logs import log, log_to
from isthmus.cloud.pipeline import NextStage
from isthmus.cloud.server import Served, ServerTls, StripServer
from isthmus.cloud.shelf import FileShelf
from isthmus.emulator.package import open_package
from isthmus.protocol.codecs import ACTIVATION_CODECS
from isthmus.protocol.enrolment import AuthorizedEdges
from isthmus.protocol.errors import KeyFileError, PortInUseError
from isthmus.protocol.keys import load_edge, load_worker
from isthmus.protocol.messages import MAX_PIECE, SessionInfo, Shelf, SpanLimits

CPU, CUDA = "cpu", "cuda"
DEVICES = (CPU, CUDA)
REBINDS = 5
REBIND_PAUSE = 1.0  # seconds
RESTART_PAUSE = 5.0  # seconds


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """All that a worker needs to start, and to start again. Paths, not secrets: Ray keeps this in its control store."""

    checkpoint: str  # folder: the whole model, or the edge's parts beside a saved span
    model: str  # the name that edges are told
    plan: str
    dtype: str
    parts: str  # folder with the edge's parts
    home: str  # folder with worker_key, worker_cert, authorized_edges and the tenants' adapters
    listen: str
    stash_bytes: int
    max_tokens: int
    threads: int
    log_file: str  # "" for standard error
    tls_cert: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    emulator: str = ""  # folder of the package that is offered; "" for none
    sites: bool = True
    quantize: str = NONE
    saved_span: str = ""  # folder that `isthmus cloud quantize` wrote; "" for none
    batching: bool = True  # whether calls of several sessions may share a pass
    device: str = CPU  # where the span computes, one of `DEVICES`
    number: int = 0  # of the worker, from 0 on
    address: str = ""  # host:port that edges are told
    layers: str = ""  # start:stop of a pipeline's stage; "" for all of the plan's
    edges: str = ""  # folder with the authorized_edges of a stage that no edge talks to; "" for that in the home
    next_stage: str = ""  # host:port of the pipeline's next stage; "" for none
    next_key: str = ""  # file with the key that the next stage has enrolled

    @property
    def span_dtype(self) -> str:
        """What edges are told that the span computes in: dtype, and how its weights are held where they are not."""
        return self.dtype if self.quantize == NONE else f"{self.dtype}+{self.quantize}"


class Worker:
    """One span behind one gRPC server. Made into an actor by `isthmus.cloud.serve`."""

    def __init__(self, spec: WorkerSpec) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold activations and keys
        self._failure: IsthmusError | None = None
        restarted = _restarted()
        try:
            self._start(spec, REBINDS if restarted else 0)
        except IsthmusError as error:
            self._failure = error  # told by `port`: of an actor that dies in its constructor, Ray keeps only a text
            if restarted:  # nobody calls `port` again, so this process would stay and listen to nothing
                log("restart_failed", logging.ERROR, error=str(error))
                time.sleep(RESTART_PAUSE)
                os._exit(1)  # Ray tries again

    def _start(self, spec: WorkerSpec, rebinds: int) -> None:
        self._spec, self._restarts = spec, 0
        log_to(Path(spec.log_file) if spec.log_file else None)
        served = served_by(spec)
        self._span = str(served.executor.host.span.layer_span)
        identity, edges = load_worker(Path(spec.home)), EdgesFile(Path(spec.edges or spec.home))
        self._server = StripServer(served, identity, edges, spec.threads, next_stage_of(spec), batching=spec.batching)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="data-plane", daemon=True).start()
        tls = _tls(spec)
        self._port = self._listen(spec.listen, tls, rebinds)

    def _listen(self, listen: str, tls: ServerTls | None, rebinds: int) -> int:
        """Bind; a restarted worker tries again, as the process before it may hold the port for a moment more."""
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

    def exchange(self, word: Word) -> Report:
        """Take word of the other workers, and tell of this one. Raises IsthmusError where it could not start."""
        self.port()
        spec = self._spec
        if word.restarts is not None:
            self._restarts = word.restarts
        self._loop.call_soon_threadsafe(self._server.hear, spec.address, word.peers)
        if word.shed:
            self._loop.call_soon_threadsafe(self._server.shed, word.shed)
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
        if spec.edges:  # a stage inside a pipeline is none of the edges' business
            return Report(own, None)
        return Report(own, Peer(spec.address, str(status["state"]), self._server.seats()))

    def metrics(self) -> bytes:
        """The worker's metrics in Prometheus' text format. Raises IsthmusError where it could not start."""
        self.port()
        return self._server.metrics.text()

    def drain(self, grace: float) -> bool:
        """Finish the calls in flight and stop listening."""
        return asyncio.run_coroutine_threadsafe(self._server.drain(grace), self._loop).result()


def _restarted() -> bool:
    """Whether this process takes the place of a worker that died."""
    import ray

    return ray.is_initialized() and bool(ray.get_runtime_context().was_current_actor_reconstructed)


class EdgesFile:
    """`authorized_edges`, read again whenever it has changed.

    Raises:
        ConfigError: The file is malformed at the start, when there is no good list to fall back on.
        KeyFileError: It cannot be read.
    """

    def __init__(self, home: Path) -> None:
        self._path = home / "authorized_edges"
        self._stamp: tuple[int, int] | None = None
        self._edges = AuthorizedEdges.parse("")
        if self._path.exists():  # where nobody is enrolled yet, there is none
            self._edges = AuthorizedEdges.load(self._path)

    def __call__(self) -> AuthorizedEdges:
        """Who is enrolled now: nobody where there is no file, the last good list where it is malformed."""
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return AuthorizedEdges.parse("")
        stamp = (stat.st_mtime_ns, stat.st_size)
        if stamp != self._stamp:
            try:
                self._edges = AuthorizedEdges.load(self._path)
            except (ConfigError, KeyFileError) as error:
                # A typing mistake must not lock everybody out (nor let a stranger in): the last good list stays.
                log("authorized_edges_unreadable", error=str(error))
            self._stamp = stamp
        return self._edges


def served_by(spec: WorkerSpec) -> Served:
    """Load what a worker serves.

    Raises:
        IsthmusError: the model, the edge's parts or the package cannot be served.
    """
    checkpoint = Checkpoint(Path(spec.checkpoint), spec.model)
    config = checkpoint.config
    plan = SplitPlan.parse(spec.plan, config.num_hidden_layers)
    dtype = DTYPES[spec.dtype]
    layers = Span(*map(int, spec.layers.split(":"))) if spec.layers else plan.cloud
    if spec.saved_span:
        span = load_saved_span(Path(spec.saved_span), layers)
    else:
        span = load_span(checkpoint, layers, dtype=dtype, quantizer=quantizer_of(spec.quantize))
    host = SiteHost(span.to(spec.device))
    info = SessionInfo(
        session_id="",
        model=spec.model,
        digest=checkpoint.digest(),
        family=config.model_type,
        n_layers=config.num_hidden_layers,
        plan=str(plan),
        hidden_size=span.hidden_size,
        attn_implementation=family_of(config).attention(None),
        span_dtype=spec.span_dtype,
        codecs=ACTIVATION_CODECS,
        limits=SpanLimits(
            spec.max_tokens, _message_bytes(spec.max_tokens, span.hidden_size, host.widest), spec.stash_bytes
        ),
        server_version=importlib.metadata.version("isthmus"),
    )
    executor = Executor(host, dtype, spec.stash_bytes)
    package = open_package(Path(spec.emulator), signer=load_worker(Path(spec.home)).pin) if spec.emulator else None
    adapters = AdapterStore(
        Path(spec.home) / "adapters",
        Path(spec.parts),
        info.digest,
        plan,
        executor,
        max_tokens=spec.max_tokens,
        attn_implementation=info.attn_implementation,
        package=package,
    )
    return Served(
        info,
        executor,
        FileShelf(Path(spec.parts), Shelf.PARTS),
        adapters,
        None if package is None else FileShelf(package.folder, Shelf.EMULATOR),
        spec.sites,
    )


def next_stage_of(spec: WorkerSpec) -> NextStage | None:
    """Where the calls of a pipeline's stage go on; None for the last one, and for a worker that has the whole span.

    Raises:
        KeyFileError: the stage's key is missing.
    """
    if not spec.next_stage:
        return None
    pin, key = load_worker(Path(spec.home)).pin, load_edge(Path(spec.next_key))
    return NextStage(spec.next_stage, pin, key, spec.dtype)  # the codec of the dtype's name carries it as it is


def _message_bytes(max_tokens: int, hidden_size: int, group: int) -> int:
    """The largest message of a session.

    A backward call with its replay (two fp32 tensors, a mask, position ids), what a group of sites sends or is sent, or
    a piece of a file, and 1 MiB to spare.
    """
    return max(max_tokens * 4 * max(2 * hidden_size + 4, group), MAX_PIECE) + (1 << 20)


def _tls(spec: WorkerSpec) -> ServerTls | None:
    if not spec.tls_cert:
        return None
    client_ca = Path(spec.tls_client_ca).read_bytes() if spec.tls_client_ca else None
    return ServerTls(Path(spec.tls_key).read_bytes(), Path(spec.tls_cert).read_bytes(), client_ca)
