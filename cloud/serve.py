"""`isthmus cloud serve`: prepares the model, starts or joins Ray, starts the worker, and stops it gracefully.

Ray is a trust domain of its own. Its ports listen on every interface whatever it is told, so token authentication is
always on, with a token that only this user can read, and the ports are printed for the firewall's sake.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import signal
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from isthmus.backbone.errors import ConfigError
from isthmus.backbone.files import locked, write_atomic
from isthmus.backbone.parts import export_edge_parts
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.quantize import NONE, quantizer_of
from isthmus.backbone.saved_span import PARTS, SpanInfo, is_saved_span, read_info
from isthmus.backbone.sources import Checkpoint, default_cache, files_beside_the_weights, resolve
from isthmus.backbone.span import DTYPES
from isthmus.cloud.state import clear_state, write_state
from isthmus.cloud.worker import Worker, WorkerSpec
from isthmus.emulator.errors import PackageError
from isthmus.emulator.package import check_package_fits, open_package
from isthmus.protocol.enrolment import AuthorizedEdges, ConnectionString
from isthmus.protocol.errors import PortInUseError, UnreachableError
from isthmus.protocol.keys import WorkerIdentity, load_worker

NAMESPACE = "isthmus"
MAX_PORT = 65535
DEFAULT_PLAN, DEFAULT_DTYPE = "2:2", "fp32"
POLL_SECONDS = 10.0
DEAD_POLLS = 3

# glibc gives memory back to the kernel and takes it again at every large message unless it is told not to (20 times
# slower), and idle OpenMP threads of one process spin on the cores that the other needs.
WORKER_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "OMP_WAIT_POLICY": "passive",
}


class Serving:
    """A running worker and the Ray that it runs in.

    Args:
        spec: what the worker serves; its `listen` has a fixed port.
        address: address of an existing Ray cluster, or None to start Ray on this machine.
        home: the cloud's folder.
    """

    def __init__(self, spec: WorkerSpec, address: str | None, home: Path) -> None:
        if address is None:  # an existing cluster has its own rules, and its owner has set this environment for them
            os.environ.update(_ray_environment(home))
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray = ray
        # "local" is a Ray of its own; without it, Ray would join whichever one somebody else runs on this machine.
        alone = {"address": "local", "include_dashboard": False, "num_cpus": os.cpu_count()}
        options = {"address": address} if address else alone
        try:
            ray.init(namespace=NAMESPACE, log_to_driver=True, configure_logging=False, **options)
        except ConnectionError as error:
            raise UnreachableError(
                f"no Ray cluster answers at {address}: check --address and the cluster ({error})"
            ) from None
        environment = {**WORKER_ENVIRONMENT, "OMP_NUM_THREADS": str(spec.threads)}
        # The worker's files and port are this node's, so it stays here in a cluster of several.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(
            max_restarts=-1,
            max_concurrency=4,
            num_cpus=0,
            runtime_env={"env_vars": environment},
            scheduling_strategy=here,
        )(Worker)
        self._worker = actor.remote(spec)
        self.port: int = self._get(self._worker.port.remote())

    def ray_ports(self) -> list[int]:
        """Ports of this node's Ray. They listen on every interface, whatever Ray is told."""
        node = next(
            node for node in self._ray.nodes() if node["NodeID"] == self._ray.get_runtime_context().get_node_id()
        )
        control = self._ray.get_runtime_context().gcs_address.rpartition(":")[2]
        ports = {
            int(control),
            *(node.get(name, 0) for name in ("NodeManagerPort", "ObjectManagerPort", "RuntimeEnvAgentPort")),
        }
        return sorted(ports - {0})

    def drain(self, grace: float) -> bool:
        """Finish the calls in flight, for at most `grace` seconds; True if all were answered."""
        try:
            return bool(self._ray.get(self._worker.drain.remote(grace)))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayActorError:
            return False  # the worker is dead or being restarted, and its calls with it

    def is_dead(self) -> bool:
        """Whether the worker is dead now. One that Ray restarts or that is busy is not, or not for long."""
        try:
            self._ray.get(self._worker.port.remote(), timeout=POLL_SECONDS)
        except self._ray.exceptions.ActorDiedError:
            return True
        except (self._ray.exceptions.RayError, TimeoutError):
            return False
        return False

    def close(self) -> None:
        """End the worker, and Ray where it was started here."""
        self._ray.kill(self._worker)
        self._ray.shutdown()

    def _get(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.ActorDiedError as error:
            raise ConfigError(f"the worker could not start: {str(error).strip().splitlines()[-1]}") from None


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
    stash_bytes: int = 2 << 30,
    max_tokens: int = 1 << 16,
    threads: int | None = None,
    address: str | None = None,
    grace: float = 30.0,
    connection_file: Path | None = None,
    emulator: Path | None = None,
    sites: bool = True,
    batching: bool = True,
    tls: tuple[Path, Path, Path | None] | None = None,
    ready: Callable[[str], None] = lambda connection: None,
) -> bool:
    """Serve until SIGTERM or SIGINT; see `isthmus cloud serve --help` for the arguments.

    Returns:
        Whether every call in flight was answered before the end.

    Raises:
        PackageError: the package of `emulator` is damaged, or of another model or plan.
        SignerError: it was signed under another root key.
        IsthmusError: the model, an address or a key cannot be used.
    """
    console = Console(stderr=True)
    identity = load_worker(home)
    if (home / "authorized_edges").exists():
        AuthorizedEdges.load(home / "authorized_edges")  # a malformed line is told here, before anything is started
    backbone = _backbone(model, edge_layers, dtype, quantize, console)
    checkpoint, plan = backbone.checkpoint, backbone.plan
    with ExitStack() as held:
        spec = WorkerSpec(
            checkpoint=str(checkpoint.folder),
            model=checkpoint.name,
            plan=str(plan),
            dtype=backbone.dtype,
            quantize=backbone.quantize,
            saved_span=backbone.saved_span,
            parts=str(_prepare_parts(checkpoint, plan)),
            home=str(home.absolute()),
            listen=_claim(listen, held),
            metrics=_claim(metrics, held, "--metrics") if metrics else "",
            stash_bytes=stash_bytes,
            max_tokens=max_tokens,
            threads=threads or os.cpu_count() or 1,
            log_file=str((home / "worker.log").absolute()),
            emulator="" if emulator is None else _checked_package(emulator, identity, checkpoint, plan),
            sites=sites,
            batching=batching,
            **({} if tls is None else _tls_paths(*tls)),
        )
        stop = threading.Event()
        with console.status("starting Ray and the worker"):
            serving = Serving(spec, address, home)
        for number in (signal.SIGTERM, signal.SIGINT):  # after ray.init, which sets handlers of its own
            signal.signal(number, lambda *_: stop.set())
        try:
            host = advertise or spec.listen.rpartition(":")[0]
            connection = str(ConnectionString(host.strip("[]"), serving.port, identity.pin, tls is not None))
            if connection_file is not None:
                write_atomic(connection_file, f"{connection}\n".encode())
            write_state(home, {"connection": connection, "metrics": spec.metrics, "pid": os.getpid()})
            ports = ", ".join(map(str, serving.ray_ports()))
            console.print(
                f"Ray listens on every interface, ports {ports}: keep them behind a firewall", highlight=False
            )
            ready(connection)
            _wait(stop, serving.is_dead)
            with console.status(f"draining: finishing the calls in flight (at most {grace:.0f} s)"):
                return serving.drain(grace)
        finally:
            clear_state(home)
            serving.close()


def _wait(stop: threading.Event, is_dead: Callable[[], bool], poll: float = POLL_SECONDS) -> None:
    """Wait to be told to stop, and look after the worker meanwhile.

    Raises:
        UnreachableError: the worker is dead, `DEAD_POLLS` times in a row: Ray does not start it again.
    """
    dead = 0
    while not stop.wait(poll):
        dead = dead + 1 if is_dead() else 0
        if dead >= DEAD_POLLS:
            raise UnreachableError(
                "the worker is gone and Ray does not start it again: look into worker.log, then run "
                "`isthmus cloud serve` anew"
            )


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
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    folder = Path(model).expanduser()
    if is_saved_span(folder):
        info = read_info(folder)
        _check_as_saved(folder, info, edge_layers, dtype, quantize)
        quantizer_of(info.quantize)
        checkpoint = Checkpoint((folder / PARTS).absolute(), info.model)
        plan = SplitPlan.parse(info.plan, checkpoint.config.num_hidden_layers)
        return _Backbone(checkpoint, plan, info.dtype, info.quantize, str(folder.absolute()))
    quantizer_of(quantize or NONE)  # told here, before anything is started
    checkpoint = resolve(model, console=console)
    plan = SplitPlan.parse(edge_layers or DEFAULT_PLAN, checkpoint.config.num_hidden_layers)
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


def _prepare_parts(checkpoint: Checkpoint, plan: SplitPlan) -> Path:
    """The edge's parts of this model and plan, made once and kept in the cache.

    The folder's name has a hash of the tokenizer's files too: they may change where the weights do not.
    """
    if checkpoint.is_edge_parts:
        return checkpoint.folder
    small = hashlib.sha256()
    for file in files_beside_the_weights(checkpoint.folder):
        small.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    name = f"{checkpoint.digest()[:16]}-{plan.bottom}-{plan.top}-{small.hexdigest()[:16]}"
    folder = default_cache() / "edge-parts" / name
    with locked(folder):
        if not folder.exists():
            export_edge_parts(checkpoint, plan, folder)
    return folder


def _checked_package(folder: Path, identity: WorkerIdentity, checkpoint: Checkpoint, plan: SplitPlan) -> str:
    """The path of a package that edges of this cloud can use."""
    package = open_package(folder, signer=identity.pin)
    check_package_fits(package, checkpoint)
    if package.plan != plan:
        raise PackageError(
            f"{folder} was made for the split plan {package.plan}, but --edge-layers is {plan}: serve with "
            f"--edge-layers {package.plan}, or build a package for {plan}"
        )
    return str(folder.absolute())


def _claim(listen: str, held: ExitStack, option: str = "--listen") -> str:
    """`host:port` with a free port, fixed now: a restarted worker must come back on the same one.

    A socket that is bound to it and does not listen goes to `held`. The worker may listen beside it, as both allow the
    reuse of addresses; but the kernel gives the port to nobody who asks for any free one, as Ray does many times before
    the worker is up.

    Raises:
        ConfigError: the address does not parse.
        PortInUseError: somebody listens there already.
    """
    host, separator, port = listen.rpartition(":")
    if not separator or not port.isdecimal() or len(port) > 9:
        raise ConfigError(f"{listen!r} is no address to listen on: write host:port, for example 127.0.0.1:7443")
    if int(port) > MAX_PORT:
        raise ConfigError(f"{listen!r} is no address to listen on: a port is a number from 0 to {MAX_PORT}")
    bare = host.strip("[]")
    try:
        family = socket.getaddrinfo(bare, int(port), type=socket.SOCK_STREAM)[0][0]
        probe = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((bare, int(port)))
        return f"{host}:{probe.getsockname()[1]}"
    except socket.gaierror:
        raise ConfigError(f"the host of {listen!r} is unknown: check its spelling") from None
    except OSError as error:
        raise PortInUseError(
            f"cannot listen on {listen} ({error.strerror}): stop what uses it, or choose another {option}"
        ) from None


def _tls_paths(cert: Path, key: Path, client_ca: Path | None) -> dict[str, str]:
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


def _ray_environment(home: Path) -> dict[str, str]:
    """Token authentication with a token file of mode 0600, no usage reports, and a worker as urgent as anything else.

    Ray gives its workers niceness 15, so that whatever else runs on the machine would come before the edges' calls.
    """
    environment = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    if "RAY_AUTH_TOKEN_PATH" in os.environ:  # a cluster's own token, given by whoever started it
        return environment
    token = home / "ray_token"
    if not token.exists():
        write_atomic(token, secrets.token_hex(32).encode(), 0o600)
    return {**environment, "RAY_AUTH_TOKEN_PATH": str(token.absolute())}
