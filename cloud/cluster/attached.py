"""A cloud over several machines, from its owner's side: `serve --address`, `attach`, `scale` and `stop`.

None of these processes is needed while the cloud serves. `serve` and `attach` only look after it: they say what is
wrong, and start it again where Ray's control store was lost and came back with nothing in it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from isthmus.backbone.checkpoints.built_in import BUILT_IN
from isthmus.cloud.cluster.cluster_controller import COUNTS_FILE, ClusterController, same_cloud
from isthmus.cloud.cluster.cluster_spec import RESOURCE, Claims, ClusterSpec, controller_name
from isthmus.cloud.cluster.issuing import enrolled_nodes
from isthmus.cloud.cluster.joined_cluster import JoinedCluster, Node, start_here
from isthmus.cloud.cluster.trust import check_trust
from isthmus.cloud.control.cluster import WORKER_ENVIRONMENT, is_open
from isthmus.cloud.control.ports import parse_address
from isthmus.cloud.control.ray_cluster import Actor, ActorError, ActorGoneError, MethodError, find_actor
from isthmus.cloud.control.serve_options import ClusterOptions, ServeOptions
from isthmus.cloud.control.serve_state import clear_state, write_state
from isthmus.cloud.control.stop_signals import stop_on_signals
from isthmus.cloud.control.worker import CUDA
from isthmus.cloud.control.worker_specs import (
    Backbone,
    backbone_of,
    check_device,
    check_package,
    count_workers,
    worker_spec,
)
from isthmus.cloud.engine.freed_memory import wiping
from isthmus.cloud.home.home_lock import occupied
from isthmus.cloud.nodes.node_worker import ANY_HOST, NODE_HOST, NodeSpec
from isthmus.cloud.telemetry.logs import log, log_file, log_to
from isthmus.common.errors import ConfigError, UnreachableError
from isthmus.common.files import write_atomic
from isthmus.protocol.enrolment import MAX_PLACES, AuthorizedEdges, ConnectionString
from isthmus.protocol.limits import MAX_WORKERS
from isthmus.protocol.secure.keyfiles import check_folder
from isthmus.protocol.secure.keys import ROOT_KEY, Issuer, load_issuer

POLL_SECONDS = 2.0
"""Between two looks at the cloud."""
ANSWER_SECONDS = 10.0
"""How long the controller may take to answer: a process that imports torch beside it answers late."""
SILENT_SECONDS = 30.0
"""For which Ray's control store may be silent before this process leaves it: after 60 Ray would end the process."""
LOST_SECONDS = 60.0
"""For which the controller may be silent, while the control store answers, before it is looked for anew."""
REJOIN_SECONDS = 1.0
"""Between two attempts to join a cluster whose control store was lost."""
STOP_SECONDS = 60.0
"""Beyond the grace, for all workers to end."""


def serve_on_cluster(options: ServeOptions, ready: Callable[[str], None] = lambda connection: None) -> None:
    """Start a cloud on a Ray cluster, or find it there, and look after it until SIGTERM or SIGINT; it goes on then.

    Args:
        options: see `isthmus cloud serve --help`.
        ready: called with the connection string once the cloud serves.

    Raises:
        ConfigError: an option does not make sense on a cluster, or a cloud of that name runs with others.
        KeyFileError: a key cannot be used, or another user may write the home.
        UnreachableError: the cluster does not answer.
        IsthmusError: the model, an address or a key cannot be used.
    """
    console = Console(stderr=True)
    cluster_options = _cluster_options(options)
    options = dataclasses.replace(options, home=options.home.resolve())
    home = options.home
    issuer = _check_home(home, console)
    backbone = backbone_of(options, console)
    check_device(options.device, wipe_freed=options.wipe_freed)
    if options.emulator is not None:
        check_package(options.emulator, issuer.pin, backbone)
    with occupied(home), console.status("starting the workers") as status:
        log_to(log_file(home, "serve"))
        cluster = JoinedCluster(cluster_options.address)
        nodes = cluster.nodes()
        check_trust(nodes)
        _check_nodes(nodes, options.device)
        spec = _spec(options, cluster_options, backbone, issuer, nodes)
        stop = threading.Event()
        watched = _Watched(cluster, cluster_options, spec, console, fresh=True)
        stop_on_signals(stop)
        places = watched.until_ready(stop, status.update)
    if places is None:
        console.print(_GOES_ON.format(name=cluster_options.name, address=cluster_options.address), highlight=False)
        return
    connection = str(_connection(options, spec, issuer, places))
    write_state(home, {"connection": connection, "metrics": spec.metrics, "pid": os.getpid()})
    if options.connection_file is not None:
        write_atomic(options.connection_file, f"{connection}\n".encode())
    ready(connection)
    if not cluster_options.detach:
        watched.look_after(stop)
        console.print(_GOES_ON.format(name=cluster_options.name, address=cluster_options.address), highlight=False)
    watched.leave()


_GOES_ON = (
    "the cloud {name} goes on without this process: `isthmus cloud attach --address {address} --name {name}` looks "
    "after it again, and `isthmus cloud stop` ends it"
)


def attach(address: str, name: str) -> None:
    """Look after a cloud that serves, until SIGTERM or SIGINT; it goes on then.

    Raises:
        UnreachableError: the cluster does not answer, or there is no cloud of that name.
    """
    console = Console(stderr=True)
    options = ClusterOptions(address, name)
    cluster = JoinedCluster(address)
    spec: ClusterSpec = _ask(_found(name), "ready")["spec"]
    stop = threading.Event()
    stop_on_signals(stop)
    watched = _Watched(cluster, options, spec, console)
    console.print(f"the cloud {name} serves; Ctrl-C leaves it", highlight=False)
    watched.look_after(stop)
    watched.leave()


def scale(address: str, name: str, least: int, most: int) -> None:
    """Have between `least` and `most` workers from now on.

    Raises:
        ConfigError: the numbers make no sense, or the cloud is a pipeline.
        UnreachableError: the cluster does not answer, or there is no cloud of that name.
    """
    cluster = JoinedCluster(address)
    controller = _found(name)
    spec: ClusterSpec = _ask(controller, "ready")["spec"]
    if spec.stages:
        raise ConfigError(f"the cloud {name} is a pipeline of {len(spec.stages)} stages, and has as many workers")
    if not 1 <= least <= most <= MAX_WORKERS:
        raise ConfigError(f"{least}:{most} is no number of workers: write N, or MIN:MAX, from 1 to {MAX_WORKERS}")
    _ask(controller, "scale", least, most)
    cluster.leave()


def stop(address: str, name: str, home: Path, grace: float) -> bool:
    """Finish the calls in flight, for at most `grace` seconds, and end the cloud; True if all were answered.

    Raises:
        UnreachableError: the cluster does not answer, or there is no cloud of that name.
    """
    cluster = JoinedCluster(address)
    controller = _found(name)
    try:
        finished = bool(controller.ask("stop", grace).result(grace * MAX_WORKERS + STOP_SECONDS))
    except ActorError:
        finished = False
    controller.kill()
    clear_state(home)
    cluster.leave()
    return finished


class _Watched:
    """A cloud that this process looks after."""

    def __init__(
        self,
        cluster: JoinedCluster,
        options: ClusterOptions,
        spec: ClusterSpec,
        console: Console,
        *,
        fresh: bool = False,
    ) -> None:
        self._cluster, self._options, self._spec, self._console = cluster, options, spec, console
        self._controller = self._find_or_start(fresh=fresh)
        self._faults: list[str] = []

    def _find_or_start(self, *, fresh: bool = False) -> Actor:
        """The cloud's controller; where it is `fresh`, with as many workers as this command says."""
        name = controller_name(self._options.name)
        found = find_actor(name)
        if found is not None:
            try:
                state = _ask(found, "ready")
                running, counts = state["spec"], state["counts"]
            except UnreachableError:
                found.kill()  # its node is gone, or it hangs: another one asks the workers for all that it has known
            else:
                if not same_cloud(running, self._spec):
                    raise ConfigError(
                        f"a cloud {self._options.name!r} runs with other options: stop it first (`isthmus cloud "
                        "stop`), or give this one another --name"
                    )
                if counts != (self._spec.least, self._spec.most) and fresh:
                    _ask(found, "scale", self._spec.least, self._spec.most)
                return found
        if fresh:
            (Path(self._spec.home) / COUNTS_FILE).unlink(missing_ok=True)  # of an earlier cloud, which nobody stopped
        environment = {"OMP_NUM_THREADS": "1"}
        started = start_here(ClusterController, self._spec, name=name, environment=environment)
        _ask(started, "ready")
        return started

    def until_ready(self, stop: threading.Event, say: Callable[[str], None]) -> tuple[str, ...] | None:
        """Wait until the workers serve; returns their addresses, None where `stop` was set first."""
        said: list[str] = []
        while not stop.is_set():
            state = _ask(self._controller, "ready")
            if state["ready"]:
                return tuple(state["places"])
            lines = [*state["faults"]] or state["waits"]
            say("; ".join(lines))
            for line in state["faults"]:
                if line not in said:  # a status line is overwritten, and this is for the operator to mend
                    said.append(line)
                    self._console.print(line, highlight=False, markup=False)
            stop.wait(0.2)
        return None

    def look_after(self, stop: threading.Event) -> None:
        """Until `stop` is set: say what is wrong, and start the cloud again where its control store has lost it."""
        answered = heard = time.monotonic()
        while not stop.wait(POLL_SECONDS):
            now = time.monotonic()
            if is_open(self._cluster.control_store):
                heard = now
            elif now - heard > SILENT_SECONDS:
                self._rejoin(stop)
                answered = heard = time.monotonic()
                continue
            else:
                continue  # a question to Ray would wait for the control store
            try:
                state = _ask(self._controller, "ready", seconds=POLL_SECONDS)
                answered = now
                self._tell(state["faults"])
            except UnreachableError:
                if now - answered > LOST_SECONDS:
                    log("controller_lost", logging.ERROR)
                    self._console.print("the controller does not answer: looking for it anew", highlight=False)
                    self._rejoin(stop)
                    answered = heard = time.monotonic()

    def _tell(self, faults: Iterable[str]) -> None:
        current = list(faults)
        for line in current:
            if line not in self._faults:
                self._console.print(line, highlight=False, markup=False)
        self._faults = current

    def _rejoin(self, stop: threading.Event) -> None:
        """Leave the cluster, join it again once it answers, and start what it has not."""
        log("control_store_lost", logging.ERROR)
        self._console.print("Ray's control store does not answer: waiting for the cluster", highlight=False)
        self._cluster.leave()
        while not stop.is_set():
            try:
                self._cluster = JoinedCluster(self._options.address)
                self._controller = self._find_or_start()
            except UnreachableError:
                self._cluster.leave()
                stop.wait(REJOIN_SECONDS)
                continue
            self._console.print("the cluster answers again", highlight=False)
            log("cluster_joined_again")
            return

    def leave(self) -> None:
        """Leave the cluster, which goes on."""
        self._cluster.leave()


def _cluster_options(options: ServeOptions) -> ClusterOptions:
    """Those of the cluster. Raises ConfigError where others contradict it."""
    if options.cluster is None:
        raise ValueError("these are options of a cloud on one machine")
    controller_name(options.cluster.name)
    host, port = parse_address(options.listen)
    if host not in (*ANY_HOST, NODE_HOST):
        raise ConfigError(
            f"--listen {options.listen} is one machine's: on a cluster write --listen {NODE_HOST}:{port or 7443}, for "
            f"each node's address in the cluster, or {ANY_HOST[0]}:{port or 7443}, for all of its addresses"
        )
    if not port:
        raise ConfigError("--listen with port 0 cannot be on a cluster: edges look for workers at known ports")
    for name, given in (("--tls-cert", options.tls), ("--record", options.record)):
        if given is not None:
            raise ConfigError(f"{name} is for one machine: leave it out on a cluster (sessions are sealed in any case)")
    return options.cluster


def _check_home(home: Path, console: Console) -> Issuer:
    """Check the owner's folder. Raises KeyFileError, ConfigError."""
    check_folder(home)
    issuer = load_issuer(home)
    if (home / ROOT_KEY).exists():
        console.print(
            f"{home / ROOT_KEY} lies here, and nothing here needs it: keep it on a machine that is not on the network",
            highlight=False,
        )
    if (home / "authorized_edges").exists():
        AuthorizedEdges.load(home / "authorized_edges")
    if not len(enrolled_nodes(home)):
        raise ConfigError(
            f"no node is enrolled in {home}: run `isthmus cloud node-keygen` on each node, and `isthmus cloud "
            "enroll-node NODE_KEY.pub` here"
        )
    return issuer


def _check_nodes(nodes: Iterable[Node], device: str) -> None:
    """Check that some node takes workers, or may be added. Raises ConfigError."""
    if not any(node.workers for node in nodes) and not os.environ.get("ISTHMUS_AUTOSCALED"):
        raise ConfigError(
            f"no node of the cluster takes workers: start those that should with `ray start --resources='{{"
            f'"{RESOURCE}": N}}\'`, for N workers each (with an autoscaler that adds such nodes, set '
            "ISTHMUS_AUTOSCALED=1)"
        )


def _spec(
    options: ServeOptions, cluster: ClusterOptions, backbone: Backbone, issuer: Issuer, nodes: Iterable[Node]
) -> ClusterSpec:
    count = count_workers(options, backbone.plan)
    takes = [node for node in nodes if node.workers]
    beside = max([1, *(int(node.workers) for node in takes)])
    template = worker_spec(options, backbone, beside=min(beside, count.most), threads=options.threads or 0)
    environment = dict(WORKER_ENVIRONMENT)
    if options.threads:
        environment["OMP_NUM_THREADS"] = str(options.threads)
    if options.wipe_freed:
        environment |= wiping(os.environ)
    parts = "" if backbone.checkpoint.is_edge_parts else backbone.parts.name
    worker = NodeSpec(
        cluster.name,
        issuer.pin.digest,
        dataclasses.replace(template, listen=options.listen),
        backbone.checkpoint.digest(),
        _on_the_hub(options.model, backbone),
        parts,
        _host(options.advertise),
    )
    port = parse_address(options.listen)[1]
    stages = tuple(map(str, backbone.plan.cloud.cut(options.pipeline))) if options.pipeline > 1 else ()
    return ClusterSpec(
        cloud=cluster.name,
        home=str(options.home),
        worker=worker,
        least=count.least,
        most=count.most,
        stages=stages,
        claims=Claims(cluster.worker_memory, 1 if options.device == CUDA else 0, cluster.labels),
        places=tuple(_place(node.address, port) for node in takes),
        metrics=options.metrics,
        grace=options.grace,
        hours=cluster.certificate_hours,
        environment=environment,
    )


def _on_the_hub(model: str, backbone: Backbone) -> str:
    """The model's name on the hub, with the revision that the owner has; "" where it is not from there."""
    revision = backbone.checkpoint.revision
    local = Path(model).expanduser().exists()
    elsewhere = local or model == BUILT_IN or revision is None or backbone.saved_span
    return "" if elsewhere else f"{backbone.checkpoint.name}@{revision}"


def _connection(options: ServeOptions, spec: ClusterSpec, issuer: Issuer, serving: Iterable[str]) -> ConnectionString:
    """The connection string: the workers that serve, and the other nodes, where a worker may come back."""
    port = parse_address(options.listen)[1]
    if options.advertise is not None:
        found = [f"{_host(options.advertise)}:{port}"]
    else:
        found = list(dict.fromkeys((*serving, *spec.places)))[:MAX_PLACES]
    host, _, at = found[0].rpartition(":")
    return ConnectionString(host.strip("[]"), int(at), issuer.pin, others=tuple(found[1:]))


def _host(advertise: str | None) -> str:
    """A host for an address, an IPv6 one in brackets; "" where there is none."""
    bare = (advertise or "").strip("[]")
    return f"[{bare}]" if ":" in bare else bare


def _place(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _found(name: str) -> Actor:
    """The controller of a cloud. Raises UnreachableError where there is none."""
    found = find_actor(controller_name(name))
    if found is None:
        raise UnreachableError(f"there is no cloud {name!r} in this cluster: check --name, or `isthmus cloud serve` it")
    return found


def _ask(controller: Actor, method: str, *arguments: object, seconds: float = ANSWER_SECONDS) -> Any:
    """Ask the controller. Raises what the method raises, and UnreachableError where it does not answer."""
    try:
        return controller.ask(method, *arguments).result(seconds)
    except MethodError as error:
        raise error.cause from None
    except ActorGoneError as error:
        raise UnreachableError(f"the cloud's controller is gone: {error}") from None
    except ActorError as error:
        raise UnreachableError(f"the cloud's controller does not answer ({error})") from None
