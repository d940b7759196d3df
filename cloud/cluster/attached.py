"""A cloud over several machines, from its owner's side: `serve --address`, `attach`, `scale` and `stop`.

None of these processes is needed while the cloud serves. `serve` and `attach` only look after it: they say what is
wrong, and start it again where Ray's control store was lost and came back with nothing in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

from rich.console import Console

from isthmus.cloud.cluster.cloud_records import (
    CloudNote,
    clear_serving,
    read_note,
    write_note,
)
from isthmus.cloud.cluster.cluster_controller import DRAIN_SLACK_SECONDS
from isthmus.cloud.cluster.cluster_spec import ClusterSpec, controller_name, worker_name
from isthmus.cloud.cluster.joined_cluster import JoinedCluster, named_actors
from isthmus.cloud.cluster.planned_cluster import (
    check_nodes,
    check_owners_folder,
    cluster_options_of,
    cluster_spec_of,
)
from isthmus.cloud.cluster.ray_tls import check_trust
from isthmus.cloud.cluster.watched_cloud import WatchedCloud, ask, stopped_error
from isthmus.cloud.control.ray_cluster import Actor, find_actor
from isthmus.cloud.control.serve_options import ClusterOptions, ServeOptions
from isthmus.cloud.control.stop_signals import stop_on_signals
from isthmus.cloud.control.worker_specs import backbone_of, check_device, check_model, check_packages
from isthmus.cloud.home.home_lock import occupied
from isthmus.cloud.telemetry.logs import log_file, log_to
from isthmus.common.errors import ConfigError, IsthmusError, UnreachableError
from isthmus.protocol.limits import MAX_WORKERS

STOP_SECONDS = 10.0
"""Beyond the time to drain, for the controller to end the workers' processes."""


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
    cluster_options = cluster_options_of(options)
    options = dataclasses.replace(options, home=options.home.resolve())
    home = options.home
    check_model(options.model)
    issuer = check_owners_folder(home, console)
    backbone = backbone_of(options, console)
    check_device(options.device, wipe_freed=options.wipe_freed)
    options = check_packages(options, issuer.pin, backbone)
    with occupied(home), console.status("starting the workers") as status:
        log_to(log_file(home, "serve"))
        cluster = JoinedCluster(cluster_options.address)
        nodes = cluster.nodes()
        check_trust([node.address for node in nodes], autoscaled=cluster_options.autoscaled)
        check_nodes(nodes, autoscaled=cluster_options.autoscaled)
        if not any(node.workers for node in nodes):
            console.print(_WHOLE_MACHINES, highlight=False, markup=False)
        spec = cluster_spec_of(options, cluster_options, backbone, issuer, nodes)
        stop = threading.Event()
        watched = WatchedCloud(cluster, cluster_options, spec, console, fresh=True)
        stop_on_signals(stop)
        places = watched.until_ready(stop, status.update)
    if places is None:
        console.print(_GOES_ON.format(name=cluster_options.name, address=cluster_options.address), highlight=False)
        return
    connection = watched.write_first(places, options.connection_file)
    ready(connection)
    if not cluster_options.detach and watched.look_after(stop):
        console.print(_GOES_ON.format(name=cluster_options.name, address=cluster_options.address), highlight=False)
    watched.leave()


_WHOLE_MACHINES = (
    "no machine takes workers yet, so each worker will budget a whole machine: have the autoscaler's machines take one "
    "worker each, or start one of them before the cloud"
)
_GOES_ON = (
    "the cloud {name} goes on without this process: `isthmus cloud attach --address {address} --name {name}` looks "
    "after it again, and `isthmus cloud stop` ends it"
)


def attach(address: str, name: str) -> None:
    """Look after a cloud that serves, until SIGTERM or SIGINT; it goes on then.

    Raises:
        UnreachableError: the cluster does not answer, there is no cloud of that name, or it was stopped.
    """
    console = Console(stderr=True)
    cluster = JoinedCluster(address)
    _, state = _serving(name)
    note = read_note(cluster, name) or CloudNote()
    if note.stopped:
        raise stopped_error(name)
    options = ClusterOptions(address, name, autoscaled=note.autoscaled)
    stop = threading.Event()
    stop_on_signals(stop)
    watched = WatchedCloud(cluster, options, state["spec"], console)
    watched.write_found(state)
    console.print(f"the cloud {name} serves; Ctrl-C leaves it", highlight=False)
    watched.look_after(stop)
    watched.leave()


def scale(address: str, name: str, least: int, most: int) -> None:
    """Have between `least` and `most` workers from now on.

    Raises:
        ConfigError: the numbers make no sense, or the cloud is a pipeline.
        UnreachableError: the cluster does not answer, there is no cloud of that name, or it was stopped.
    """
    cluster = JoinedCluster(address)
    controller, state = _serving(name)
    spec: ClusterSpec = state["spec"]
    if spec.stages:
        raise ConfigError(f"the cloud {name} is a pipeline of {len(spec.stages)} stages, and has as many workers")
    if not 1 <= least <= most <= MAX_WORKERS:
        raise ConfigError(f"{least}:{most} is no number of workers: write N, or MIN:MAX, from 1 to {MAX_WORKERS}")
    ask(controller, "scale", least, most)
    cluster.leave()


def stop(address: str, name: str, grace: float) -> bool:
    """Finish the calls in flight, for at most `grace` seconds, and end the cloud; True if all were answered.

    Workers are ended, too, where the controller is away; their calls are cut off then. The control store keeps that the
    cloud was stopped: a `serve` or `attach` that looks after it, wherever it runs, ends and does not start it again.

    Raises:
        UnreachableError: the cluster does not answer, or there is no cloud of that name.
    """
    cluster = JoinedCluster(address)
    controller = find_actor(controller_name(name))
    workers = named_actors(lambda number: worker_name(name, number))
    if controller is None and not workers:
        cluster.leave()
        raise _no_cloud(name)
    spec: ClusterSpec | None = None
    if controller is not None:
        with contextlib.suppress(IsthmusError):  # or its port was taken when it started anew
            spec = ask(controller, "state")["spec"]
    note = dataclasses.replace(read_note(cluster, name) or CloudNote(), stopped=True)
    write_note(cluster, name, note)  # before anything ends: what looks after the cloud would start it again
    finished = False
    if controller is not None:
        if spec is not None:
            turns = max(1, len(spec.stages))
            seconds = (grace + DRAIN_SLACK_SECONDS) * turns + STOP_SECONDS
            with contextlib.suppress(UnreachableError):
                finished = bool(ask(controller, "stop", grace, seconds=seconds))
        controller.kill()
    for worker in named_actors(lambda number: worker_name(name, number)).values():
        worker.kill()
    clear_serving(note)
    cluster.leave()
    return finished


def _serving(name: str) -> tuple[Actor, dict[str, Any]]:
    """The controller of a cloud and its state. Raises UnreachableError where there is none, or it was stopped."""
    found = find_actor(controller_name(name))
    if found is None:
        raise _no_cloud(name)
    state: dict[str, Any] = ask(found, "state")
    if state["stopped"]:
        raise stopped_error(name)
    return found, state


def _no_cloud(name: str) -> UnreachableError:
    return UnreachableError(f"there is no cloud {name!r} in this cluster: check --name, or `isthmus cloud serve` it")
