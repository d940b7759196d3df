"""What a worker serves, made of its specification: span, keys, enrolled edges, packages, a pipeline's next stage."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import torch

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.checkpoints.span_format import NONE
from isthmus.backbone.checkpoints.weight_quantization import bytes_of, quantizer_of
from isthmus.backbone.families import family_of
from isthmus.backbone.plan import Span, SplitPlan
from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.split.edge_parts import export_edge_parts
from isthmus.backbone.split.saved_span import load_saved_span
from isthmus.backbone.split.span import DTYPES, load_span
from isthmus.cloud.control.worker import CPU, WorkerSpec, no_gpu
from isthmus.cloud.engine.executor import Executor
from isthmus.cloud.gateway.pipeline import NextStage
from isthmus.cloud.gateway.server import ServerTls
from isthmus.cloud.session.file_store import FileStore, HashedLater
from isthmus.cloud.session.handler import OfferedPackage
from isthmus.cloud.session.served_model import Served
from isthmus.cloud.session.tenant_adapters import AdapterStore
from isthmus.cloud.session.token_counts import TokenCounts
from isthmus.cloud.telemetry.logs import log
from isthmus.common.errors import ConfigError, KeyFileError
from isthmus.common.files import locked
from isthmus.common.machine import usable_memory
from isthmus.emulator.package.package import Package, open_package
from isthmus.privacy.recording.recorder import Recorder
from isthmus.protocol.enrolment import EDGES_FILE, REVOKED_FILE, WORKERS_FILE, AuthorizedEdges
from isthmus.protocol.messages import MAX_FILE_CHUNK, FileSet, SessionInfo, SpanLimits
from isthmus.protocol.secure.keys import load_edge, load_worker
from isthmus.protocol.tensor_codecs import ACTIVATION_CODECS


def edges_of(spec: WorkerSpec) -> Callable[[], AuthorizedEdges]:
    """Tells who may open sessions now: enrolled edges, and on several machines the cloud's other workers."""
    home = Path(spec.edges or spec.home)
    edges, workers = edges_in(home), EdgesFile(home, WORKERS_FILE)
    return lambda: edges().joined(workers())


def edges_in(home: Path) -> Callable[[], AuthorizedEdges]:
    """Tells who is enrolled in a folder now, without the revoked keys."""
    edges, revoked = EdgesFile(home), EdgesFile(home, REVOKED_FILE)
    return lambda: edges().without(revoked())


class EdgesFile:
    """`authorized_edges`, or another file of its form, read again whenever it has changed.

    Where there is no `authorized_edges` any more, or it is empty, nobody is enrolled. Where that is so of
    `revoked_edges`, the last list stays: somebody may be writing it, and no revoked key must get in meanwhile.

    Raises:
        ConfigError: The file is malformed at the start, when there is no good list to fall back on.
        KeyFileError: It cannot be read.
    """

    def __init__(self, home: Path, name: str = EDGES_FILE) -> None:
        self._path = home / name
        self._keeps = name == REVOKED_FILE
        self._stamp: tuple[int, ...] | None = None  # of the file that was read last
        self._unreadable: tuple[int, ...] | None = None  # of the file that was last said to be unreadable
        self._edges = AuthorizedEdges.parse("")
        if self._path.exists():  # where nobody is enrolled yet, there is none
            self._edges = AuthorizedEdges.load(self._path)

    def __call__(self) -> AuthorizedEdges:
        """The edges that are enrolled now: none where there is no file, the last good list where it is malformed."""
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return self._edges if self._keeps else AuthorizedEdges.parse("")
        except OSError as error:
            log(f"{self._path.name}_unreadable", error=str(error))
            return self._edges
        stamp = (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino)  # the second is of owner and mode too
        if stamp == self._stamp or (self._keeps and not stat.st_size):
            return self._edges
        try:
            self._edges = AuthorizedEdges.load(self._path)
        except (ConfigError, KeyFileError) as error:
            # A typing mistake must not lock everybody out (nor let a stranger in): the last good list stays.
            if stamp != self._unreadable:
                log(f"{self._path.name}_unreadable", error=str(error))
            self._unreadable = stamp
            if isinstance(error, KeyFileError):
                return self._edges  # its mode or owner is wrong, which is checked again at the next call
        self._stamp = stamp
        return self._edges


def served_by(spec: WorkerSpec) -> Served:
    """Load what a worker serves.

    Raises:
        IsthmusError: the device is not there, or the model, the edge's parts or the package cannot be served.
    """
    if spec.device != CPU and not torch.cuda.is_available():
        raise no_gpu(spec.device)
    checkpoint = Checkpoint(Path(spec.checkpoint), spec.model)
    config = checkpoint.config
    plan = SplitPlan.parse(spec.plan, config.num_hidden_layers)
    make_parts(checkpoint, plan, Path(spec.parts))
    dtype = DTYPES[spec.dtype]
    layers = Span(*map(int, spec.layers.split(":"))) if spec.layers else plan.cloud
    if spec.saved_span:
        span = load_saved_span(Path(spec.saved_span), layers)
    else:
        span = load_span(checkpoint, layers, dtype=dtype, quantizer=quantizer_of(spec.quantize))
    host = SiteHost(span.to(spec.device))
    free = _memory_of(spec) // spec.beside - bytes_of(span)
    stash_bytes, compute_bytes, cache_bytes = memory_budgets(
        free, spec.stash_bytes, spec.compute_bytes, spec.bounds.engine.cache_bytes
    )
    info = SessionInfo(
        session_id="",
        model=spec.model,
        digest=checkpoint.digest(),
        family=config.model_type,
        n_layers=config.num_hidden_layers,
        plan=str(plan),
        hidden_size=span.hidden_size,
        attn_implementation=family_of(config).attention(None),
        span_dtype=spec.dtype if spec.quantize == NONE else f"{spec.dtype}+{spec.quantize}",
        codecs=ACTIVATION_CODECS,
        limits=SpanLimits(spec.max_tokens, _message_bytes(spec.max_tokens, span.hidden_size, host.widest), stash_bytes),
        server_version=importlib.metadata.version("isthmus"),
        numerics="",  # the gateway says it: it depends on the engine
    )
    executor = Executor(host, dtype, stash_bytes, compute_bytes, count_graphs=spec.bounds.engine.count_graphs)
    pin = load_worker(Path(spec.home)).pin if spec.emulators else None
    packages = {name: open_package(Path(folder), signer=pin) for name, folder in spec.emulators}
    adapters = AdapterStore(
        Path(spec.home) / "adapters",
        Path(spec.parts),
        info.digest,
        plan,
        executor,
        max_tokens=spec.max_tokens,
        attn_implementation=info.attn_implementation,
        packages=[package.id for package in packages.values()],
    )
    return Served(
        info,
        executor,
        FileStore(Path(spec.parts), FileSet.PARTS),
        adapters,
        TokenCounts(Path(spec.home) / "token-counts", info.digest, plan),
        {name: _offered(package) for name, package in packages.items()},
        {str(each.plan): span.part(each.plan.cloud) for each in packages.values() if each.plan != plan},
        spec.sites,
        cache_bytes,
        HashedLater(checkpoint.folder, FileSet.MODEL) if spec.shares_model else None,
    )


def _offered(package: Package) -> OfferedPackage:
    manifest, quality = package.manifest, package.manifest.quality
    about = [] if manifest.preset is None else [f"preset {manifest.preset[:32]}"]
    about.append(f"split {package.plan}")
    if quality is not None:
        about.append(f"KL {quality.kl:.2g}, cosine above {quality.cosine_above:.2g}")
    return OfferedPackage(FileStore(package.folder, FileSet.EMULATOR), ", ".join(about))


RESERVE_BYTES = 1 << 29
"""Left to Python, its libraries, messages and the system itself when the machine's memory is divided into budgets."""
MOST_CACHE_BYTES = 2 << 30
"""Default budget of the activation cache at most: more of it only delays what evicts the states of silent edges.

`--stash-bytes` is the option; the number is a round one, and no figure hangs on it."""
LEAST_BUDGET_BYTES = 1 << 26
"""Default budget at least: a machine whose memory the weights fill should still compute small calls, if slowly."""


def memory_budgets(free: int, stash: int | None, compute: int | None, cache: int | None) -> tuple[int, int, int]:
    """The budgets, in bytes, of the activation cache, of all calls that are computed at a time, and of keys and values.

    A budget that the operator does not give is a fifth of the memory without the reserve: one each for the activation
    cache and the keys and values (2 GiB at most), one for calls that are computed, one for paused calls; one stays
    free.

    Args:
        free: this worker's bytes of the machine's memory, without the weights.
        stash: the operator's budget of the activation cache, or None.
        compute: the operator's budget of calls, or None.
        cache: the operator's budget of keys and values, or None.
    """
    fifth = max(LEAST_BUDGET_BYTES, (free - RESERVE_BYTES) // 5)
    most = min(MOST_CACHE_BYTES, fifth)
    return (
        (most if stash is None else stash),
        (fifth if compute is None else compute),
        (most if cache is None else cache),
    )


def _memory_of(spec: WorkerSpec) -> int:
    """Bytes of memory where the span computes."""
    return usable_memory() if spec.device == CPU else int(torch.cuda.mem_get_info()[1])


def make_parts(checkpoint: Checkpoint, plan: SplitPlan, folder: Path) -> None:
    """Make the edge's parts of a model where they are not there yet. One of the workers makes them, the others wait.

    Raises:
        IsthmusError: they cannot be cut, or written.
    """
    if folder.exists():
        return
    with locked(folder):
        if not folder.exists():
            export_edge_parts(checkpoint, plan, folder)


def next_stage_of(spec: WorkerSpec) -> NextStage | None:
    """Where the calls of a pipeline's stage go on; None for the last one, and for a worker that has the whole span.

    Raises:
        KeyFileError: the stage's key is missing.
    """
    if not spec.next_stage:
        return None
    own = load_worker(Path(spec.home))
    key = load_edge(Path(spec.next_key)) if spec.next_key else own.key
    # The codec of the dtype's name carries it as it is.
    return NextStage(_place_of(spec.next_stage), own.pin, key, spec.dtype)


def _place_of(where: str) -> Callable[[], str]:
    """Tells an address: this one, or that in a file of this name, which is read anew."""
    file = Path(where)
    if not file.is_absolute():
        return lambda: where
    return lambda: file.read_text().strip() if file.exists() else ""


def recorder_of(spec: WorkerSpec) -> Recorder | None:
    """What writes the recording; None where there is none to be, and in a pipeline's stage that no edge talks to."""
    return Recorder(Path(spec.record), spec.record_bytes) if spec.record and not spec.edges else None


def _message_bytes(max_tokens: int, hidden_size: int, group: int) -> int:
    """The largest message of a session, in bytes.

    It is the largest of a backward call with its replay (two fp32 tensors, a mask, position ids), the tensors of a
    group of sites, and a chunk of a file; and 1 MiB to spare.
    """
    return max(max_tokens * 4 * max(2 * hidden_size + 4, group), MAX_FILE_CHUNK) + (1 << 20)


def tls_of(spec: WorkerSpec) -> ServerTls | None:
    """The certificate that the worker shows, or None without one."""
    if not spec.tls_cert:
        return None
    client_ca = Path(spec.tls_client_ca).read_bytes() if spec.tls_client_ca else None
    return ServerTls(Path(spec.tls_key).read_bytes(), Path(spec.tls_cert).read_bytes(), client_ca)
