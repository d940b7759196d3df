"""`isthmus cloud serve`: prepares model and addresses, starts the workers, looks after them, stops them gracefully."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import shutil
import signal
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from isthmus.backbone.checkpoints.sources import Checkpoint, default_cache, files_beside_the_weights, resolve
from isthmus.backbone.checkpoints.span_format import (
    NONE,
    PARTS,
    SpanInfo,
    check_dtype,
    check_quantizer,
    is_saved_span,
    read_info,
)
from isthmus.backbone.plan import SplitPlan
from isthmus.cloud.bounds import Bounds
from isthmus.cloud.control.cluster import ControlStoreLostError, Serving
from isthmus.cloud.control.ports import Ports, parse_address
from isthmus.cloud.control.serve_state import clear_state, write_state
from isthmus.cloud.control.watches import watches
from isthmus.cloud.control.worker import CPU, DEVICES, WorkerSpec
from isthmus.cloud.home.home_lock import occupied
from isthmus.cloud.telemetry.logs import log_file
from isthmus.common.errors import ConfigError, PackageError, UnreachableError
from isthmus.common.files import disk_errors, write_atomic
from isthmus.common.machine import threads_each, usable_cores
from isthmus.common.ownership import intruder
from isthmus.emulator.package.verification import check_package_fits, verified
from isthmus.protocol.enrolment import AuthorizedEdges, ConnectionString, Quota, add_line
from isthmus.protocol.limits import MAX_WORKERS
from isthmus.protocol.secure.keyfiles import check_folder
from isthmus.protocol.secure.keys import ROOT_KEY, WorkerIdentity, generate_edge, load_worker

DEFAULT_PLAN, DEFAULT_DTYPE = "2:2", "fp32"
POLL_SECONDS = 2.0
DEAD_POLLS = 15


def serve(
    model: str,
    *,
    home: Path,
    edge_layers: str | None = None,
    listen: str = "127.0.0.1:7443",
    advertise: str | None = None,
    metrics: str = "",
    dtype: str | None = None,
    quantize: str | None = None,
    stash_bytes: int | None = None,
    compute_bytes: int | None = None,
    max_tokens: int = 1 << 13,
    threads: int | None = None,
    workers: str = "1",
    pipeline: int = 1,
    address: str | None = None,
    grace: float = 30.0,
    connection_file: Path | None = None,
    emulator: Path | None = None,
    sites: bool = True,
    batching: bool = True,
    device: str = CPU,
    tls: tuple[Path, Path, Path | None] | None = None,
    bounds: Bounds | None = None,
    ready: Callable[[str], None] = lambda connection: None,
) -> bool:
    """Serve until SIGTERM or SIGINT; see `isthmus cloud serve --help` for the arguments.

    Returns:
        Whether every call in flight was answered before the end.

    Raises:
        HomeInUseError: another process serves with this home.
        KeyFileError: a key cannot be used, or another user may write the home.
        PackageError: the package of `emulator` is damaged, or of another model or plan.
        SignerError: it was signed under another root key.
        IsthmusError: the model, an address or a key cannot be used.
    """
    console = Console(stderr=True)
    home = home.resolve()  # a link that leads elsewhere later on changes nothing
    identity = load_worker(home)
    check_folder(home)
    if (home / "authorized_edges").exists():
        AuthorizedEdges.load(home / "authorized_edges")  # a malformed line is told here, before anything is started
    if (home / ROOT_KEY).exists():
        console.print(
            f"{home / ROOT_KEY} lies here, and no worker needs it: keep it on a machine that is not on the network",
            highlight=False,
        )
    backbone = _backbone(model, edge_layers, dtype, quantize, console)
    checkpoint, plan = backbone.checkpoint, backbone.plan
    if device not in DEVICES:
        raise ConfigError(f"unknown device {device!r}: choose one of {', '.join(DEVICES)}")
    for folder in (checkpoint.folder, _parts_folder(checkpoint, plan)):
        fault = intruder(folder) if folder.exists() else None
        if fault is not None:
            console.print(f"another user may change what is served from {folder}: {fault}", highlight=False)
    least, most = _bounds(workers)
    _check_pipeline(pipeline, plan, most, emulator)
    outer = {} if tls is None else _tls_paths(*tls)
    with occupied(home) as lock, contextlib.closing(Ports()) as ports, contextlib.ExitStack() as stack:
        addresses = ports.take_several(listen, most)
        operator = ports.take(metrics, "--metrics") if metrics else ""
        spec = WorkerSpec(
            checkpoint=str(checkpoint.folder),
            model=checkpoint.name,
            plan=str(plan),
            dtype=backbone.dtype,
            quantize=backbone.quantize,
            saved_span=backbone.saved_span,
            parts=str(_parts_folder(checkpoint, plan)),
            home=str(home),
            listen="",
            stash_bytes=stash_bytes,
            compute_bytes=compute_bytes,
            beside=max(most, pipeline),
            max_tokens=max_tokens,
            threads=threads or threads_each(usable_cores(), max(most, pipeline)),
            log_file="",
            emulator="" if emulator is None else _checked_package(emulator, identity, checkpoint, plan),
            sites=sites,
            batching=batching,
            device=device,
            bounds=bounds or Bounds(),
            **outer,
        )
        host = (advertise or parse_address(listen)[0]).strip("[]")
        specs = [
            dataclasses.replace(spec, number=number, listen=own, address=_told(host, own))
            for number, own in enumerate(addresses)
        ]
        if pipeline > 1:
            specs = stack.enter_context(_stages(specs[0], plan, pipeline, ports))
        specs = [dataclasses.replace(each, log_file=str(log_file(home, "worker", each.number))) for each in specs]
        console.print(_threads_line(specs[0].threads, len(specs), usable_cores()), highlight=False)
        stop = threading.Event()
        ray_folder = None if address else lock.make_ray_folder()
        with console.status("starting Ray and the workers"):
            serving = Serving(
                specs, address, home, ray_folder, least=max(least, pipeline), metrics=operator, grace=grace
            )
        _stop_on_signals(stop)
        try:
            connection = str(ConnectionString(host, parse_address(addresses[0])[1], identity.pin, tls is not None))
            write_state(home, {"connection": connection, "metrics": operator, "pid": os.getpid()})
            if connection_file is not None:
                write_atomic(connection_file, f"{connection}\n".encode())
            for line in serving.budgets():
                console.print(line, highlight=False)
            ready(connection)
            _supervise(stop, serving, console, watches(home, specs, operator, console))
            with console.status(f"draining: finishing the calls in flight (at most {grace:.0f} s)"):
                return serving.drain(grace)
        finally:
            clear_state(home)
            serving.close()


def _bounds(workers: str) -> tuple[int, int]:
    """The least and the largest number of workers, of `N` or `MIN:MAX`.

    Raises:
        ConfigError: it is neither.
    """
    match = re.fullmatch(r"(\d{1,4})(?::(\d{1,4}))?", workers)
    least = int(match[1]) if match else 0
    most = int(match[2]) if match and match[2] else least
    if not 1 <= least <= most <= MAX_WORKERS:
        raise ConfigError(
            f"--workers {workers!r} is no number of workers: write N, or MIN:MAX, from 1 to {MAX_WORKERS}"
        )
    return least, most


def _threads_line(threads: int, workers: int, cores: int) -> str:
    """How the workers' threads fit the cores, for the operator."""
    each = f"{threads} thread{'' if threads == 1 else 's'}"
    who = f"the worker computes with {each}" if workers == 1 else f"each of at most {workers} workers has {each}"
    line = f"{who}; this process may use {cores} core{'' if cores == 1 else 's'}"
    return line if threads * workers <= cores else f"{line}, so they will wait for each other"


def _check_pipeline(stages: int, plan: SplitPlan, workers: int, emulator: Path | None) -> None:
    if not 1 <= stages <= len(plan.cloud):
        raise ConfigError(
            f"--pipeline {stages} does not fit: the cloud holds {len(plan.cloud)} layers, so it has 1 to "
            f"{len(plan.cloud)} stages"
        )
    if stages > 1 and workers > 1:
        raise ConfigError(
            f"--pipeline {stages} and --workers {workers} exclude each other: a pipeline is one worker in several "
            "stages; serve twice, from two homes and on two addresses, for more"
        )
    if stages > 1 and emulator is not None:
        raise ConfigError(
            f"--pipeline {stages} and --emulator exclude each other, as returned adapters are tried on the whole span: "
            "leave one of them out"
        )


@contextlib.contextmanager
def _stages(first: WorkerSpec, plan: SplitPlan, count: int, ports: Ports) -> Iterator[list[WorkerSpec]]:
    """What each stage of a pipeline serves. Each has a key that the next one has enrolled, for as long as this lasts.

    Only the first stage is for edges; the others listen on the loopback, as they are on this node.
    """
    folder = Path(first.home) / "pipeline"
    with disk_errors(folder):
        if folder.exists():  # of a `serve` that was killed
            shutil.rmtree(folder)
        folder.mkdir(mode=0o700)
    quota = Quota(max_sessions=10**9 - 1, max_inflight_bytes=1 << 50)
    specs: list[WorkerSpec] = []
    try:
        for number, layers in enumerate(plan.cloud.cut(count)):
            stage = dataclasses.replace(first, number=number, layers=str(layers), sites=False)
            if number:
                enrolled = folder / str(number)
                key = enrolled / "id_ed25519"
                line = generate_edge(key, f"stage-{number - 1}")
                add_line(enrolled / "authorized_edges", line, quota=quota, stage=True)
                listen = ports.take("127.0.0.1:0")
                stage = dataclasses.replace(
                    stage, listen=listen, address=listen, edges=str(enrolled), tls_cert="", tls_key="", tls_client_ca=""
                )
                specs[-1] = dataclasses.replace(specs[-1], next_stage=listen, next_key=str(key))
            specs.append(stage)
        yield specs
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _told(host: str, listen: str) -> str:
    """The address that edges are told of a worker."""
    port = parse_address(listen)[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _stop_on_signals(stop: threading.Event) -> None:
    """To be called after `ray.init`, which sets handlers of its own."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())


def _supervise(stop: threading.Event, serving: Serving, console: Console, look: Callable[[], None]) -> None:
    """Wait to be told to stop; start Ray and the workers again where its control store dies. Raises as `_wait`."""

    def tend() -> None:
        look()
        serving.tend()

    while True:
        try:
            _wait(stop, serving.is_dead, tend)
            return
        except ControlStoreLostError:
            console.print("Ray's control store is gone; starting Ray and the workers again", highlight=False)
            serving.restart()
            _stop_on_signals(stop)


def _wait(
    stop: threading.Event,
    is_dead: Callable[[], bool],
    tend: Callable[[], None] = lambda: None,
    poll: float = POLL_SECONDS,
) -> None:
    """Wait to be told to stop, and look after the workers meanwhile.

    Raises:
        UnreachableError: a worker is dead, `DEAD_POLLS` times in a row: Ray does not start it again.
    """
    dead = 0
    while not stop.wait(poll):
        dead = dead + 1 if is_dead() else 0
        if dead >= DEAD_POLLS:
            raise UnreachableError(
                "the worker is gone and Ray does not start it again: look into its log (worker.log, or worker-N.log), "
                "then run `isthmus cloud serve` anew"
            )
        tend()


@dataclass(frozen=True, slots=True)
class _Backbone:
    """What is served, and in which form."""

    checkpoint: Checkpoint
    plan: SplitPlan
    dtype: str
    quantize: str
    saved_span: str = ""


def _backbone(
    model: str, edge_layers: str | None, dtype: str | None, quantize: str | None, console: Console
) -> _Backbone:
    """A model with the options that were given, and the defaults of the others.

    Raises:
        ConfigError: an option does not make sense, or is not what a saved span was made with.
        IsthmusError: the model cannot be used.
    """
    check_dtype(dtype or DEFAULT_DTYPE)
    folder = Path(model).expanduser()
    if is_saved_span(folder):
        info = read_info(folder)
        _check_as_saved(folder, info, edge_layers, dtype, quantize)
        check_quantizer(info.quantize)
        checkpoint = Checkpoint((folder / PARTS).absolute(), info.model)
        plan = SplitPlan.parse(info.plan, checkpoint.n_layers)
        return _Backbone(checkpoint, plan, info.dtype, info.quantize, str(folder.absolute()))
    check_quantizer(quantize or NONE)  # told here, before anything is started
    checkpoint = resolve(model, console=console)
    plan = SplitPlan.parse(edge_layers or DEFAULT_PLAN, checkpoint.n_layers)
    return _Backbone(checkpoint, plan, dtype or DEFAULT_DTYPE, quantize or NONE)


def _check_as_saved(
    folder: Path, info: SpanInfo, edge_layers: str | None, dtype: str | None, quantize: str | None
) -> None:
    given = {"edge-layers": edge_layers, "dtype": dtype, "quantize": quantize}
    made = {"edge-layers": info.plan, "dtype": info.dtype, "quantize": info.quantize}
    for option, saved in made.items():
        wanted = given[option]
        if wanted not in (None, saved):
            raise ConfigError(
                f"{folder} was written with --{option} {saved}, not {wanted}: leave the option out, or write another "
                "folder with `isthmus cloud quantize`"
            )


def _parts_folder(checkpoint: Checkpoint, plan: SplitPlan) -> Path:
    """Where the edge's parts of this model and plan are kept in the cache, once a worker has made them.

    The folder's name has a hash of the tokenizer's files too: they may change where the weights do not.
    """
    if checkpoint.is_edge_parts:
        return checkpoint.folder
    small = hashlib.sha256()
    for file in files_beside_the_weights(checkpoint.folder):
        small.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    name = f"{checkpoint.digest()[:16]}-{plan.bottom}-{plan.top}-{small.hexdigest()[:16]}"
    return default_cache().absolute() / "edge-parts" / name


def _checked_package(folder: Path, identity: WorkerIdentity, checkpoint: Checkpoint, plan: SplitPlan) -> str:
    """The path of a package that edges of this cloud can use."""
    manifest, _, _ = verified(folder, identity.pin)
    check_package_fits(manifest, checkpoint)
    made_for = manifest.split_plan
    if made_for != plan:
        raise PackageError(
            f"{folder} was made for the split plan {made_for}, but --edge-layers is {plan}: serve with "
            f"--edge-layers {made_for}, or build a package for {plan}"
        )
    return str(folder.absolute())


def _tls_paths(cert: Path, key: Path, client_ca: Path | None) -> dict[str, Any]:
    for path in (cert, key, client_ca):
        if path is not None and not path.is_file():
            raise ConfigError(f"the TLS file {path} does not exist: check the path")
    try:  # gRPC would say only that it cannot listen
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        if client_ca is not None:
            context.load_verify_locations(client_ca)
    except OSError as error:
        files = ", ".join(str(path) for path in (cert, key, client_ca) if path is not None)
        raise ConfigError(f"the TLS files {files} are no PEM certificate and its key ({error}): check them") from None
    return {
        "tls_cert": str(cert.absolute()),
        "tls_key": str(key.absolute()),
        "tls_client_ca": "" if client_ca is None else str(client_ca.absolute()),
    }
