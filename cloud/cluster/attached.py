"""A cloud over several machines, from its owner's side: `serve --address`, `attach`, `scale` and `stop`.

None of these processes is needed while the cloud serves. `serve` and `attach` only look after it: they say what is
wrong, and start it again where Ray's control store was lost and came back with nothing in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from isthmus.cloud.cluster.cloud_records import (
    CloudNote,
    clear_serving,
    machines_of,
    note_of,
    read_note,
    write_note,
    write_serving,
)
from isthmus.cloud.cluster.cluster_controller import DRAIN_SLACK_SECONDS, ClusterController
from isthmus.cloud.cluster.cluster_spec import ClusterSpec, controller_name, same_cloud, worker_name
from isthmus.cloud.cluster.joined_cluster import JoinedCluster, named_actors, start_here
from isthmus.cloud.cluster.planned_cluster import (
    check_nodes,
    check_owners_folder,
    check_place,
    cluster_options_of,
    cluster_spec_of,
    connection_of,
)
from isthmus.cloud.cluster.trust import check_trust
from isthmus.cloud.cluster.worker_counts import forget_counts
from isthmus.cloud.control.cluster import is_open
from isthmus.cloud.control.ray_cluster import Actor, ActorError, ActorGoneError, MethodError, find_actor
from isthmus.cloud.control.serve_options import ClusterOptions, ServeOptions
from isthmus.cloud.control.serve_state import write_state
from isthmus.cloud.control.stop_signals import stop_on_signals
from isthmus.cloud.control.worker_specs import backbone_of, check_device, check_package
from isthmus.cloud.home.home_lock import occupied
from isthmus.cloud.telemetry.logs import log, log_file, log_to
from isthmus.common.errors import ConfigError, DiskError, IsthmusError, UnreachableError
from isthmus.common.files import write_atomic
from isthmus.protocol.limits import MAX_WORKERS

POLL_SECONDS = 2.0
"""Between two looks at the cloud, as on one machine: an operator notices no less, and a look takes milliseconds."""
ANSWER_SECONDS = 10.0
"""How long the controller may take to answer: a process that imports torch beside it answers late."""
SILENT_SECONDS = 30.0
"""For which Ray's control store may be silent before this process leaves it: after 60 Ray would end the process."""
LOST_SECONDS = 60.0
"""For which the controller may be silent, while the control store answers, before it is looked for anew.

Ray starts it again within seconds, and a machine that only is busy should not lose it."""
START_SECONDS = 60.0
"""For a new controller to answer first: its process imports torch, which takes 5 s where nothing else runs, and more on
a busy machine."""
REJOIN_SECONDS = 1.0
"""Between two attempts to join a cluster: each is a connection that is refused, or waited for."""
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
    issuer = check_owners_folder(home, console)
    backbone = backbone_of(options, console)
    check_device(options.device, wipe_freed=options.wipe_freed)
    if options.emulator is not None:
        check_package(options.emulator, issuer.pin, backbone)
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
        watched = _Watched(cluster, cluster_options, spec, console, fresh=True)
        stop_on_signals(stop)
        places = watched.until_ready(stop, status.update)
    if places is None:
        console.print(_GOES_ON.format(name=cluster_options.name, address=cluster_options.address), highlight=False)
        return
    connection = str(connection_of(options, spec, issuer, places))
    write_state(home, {"connection": connection, "metrics": spec.metrics, "pid": os.getpid()})
    if options.connection_file is not None:
        write_atomic(options.connection_file, f"{connection}\n".encode())
    watched.note_places(places, options.connection_file)
    ready(connection)
    if not cluster_options.detach and watched.look_after(stop):
        console.print(_GOES_ON.format(name=cluster_options.name, address=cluster_options.address), highlight=False)
    watched.leave()


_WHOLE_MACHINES = (
    "no machine takes workers yet, so each worker will budget a whole machine: have the autoscaler's machines take one "
    "worker each, or start one of them before the cloud"
)
_MOVED = (
    "the cloud's machines have changed, and its connection string with them: the new one is in {file}, for the edges"
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
        raise _stopped(name)
    options = ClusterOptions(address, name, autoscaled=note.autoscaled)
    stop = threading.Event()
    stop_on_signals(stop)
    watched = _Watched(cluster, options, state["spec"], console)
    watched.write_where(state, cluster.addresses())
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
    _ask(controller, "scale", least, most)
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
            spec = _ask(controller, "state")["spec"]
    note = dataclasses.replace(read_note(cluster, name) or CloudNote(), stopped=True)
    write_note(cluster, name, note)  # before anything ends: what looks after the cloud would start it again
    finished = False
    if controller is not None:
        if spec is not None:
            turns = max(1, len(spec.stages))
            seconds = (grace + DRAIN_SLACK_SECONDS) * turns + STOP_SECONDS
            with contextlib.suppress(UnreachableError):
                finished = bool(_ask(controller, "stop", grace, seconds=seconds))
        controller.kill()
    for worker in named_actors(lambda number: worker_name(name, number)).values():
        worker.kill()
    clear_serving(note)
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
        self._places: tuple[str, ...] = ()  # where the cloud is by what was written; none before
        self._connection_file: Path | None = None

    def _find_or_start(self, *, fresh: bool = False) -> Actor:
        """The cloud's controller; where it is `fresh`, with as many workers as this command says."""
        name = controller_name(self._options.name)
        note = note_of(self._spec, autoscaled=self._options.autoscaled)
        found = find_actor(name)
        if found is not None:
            state = None
            with contextlib.suppress(IsthmusError):
                state = _ask(found, "state")
            if state is None or (fresh and state["stopped"]):
                # Its node is gone, it hangs, a port was taken, or a `stop` that was broken off has left it without
                # workers: another one asks the workers that there are for all that it has known.
                found.kill()
            elif not same_cloud(state["spec"], self._spec):
                raise ConfigError(
                    f"a cloud {self._options.name!r} runs with other options: stop it first (`isthmus cloud stop`), or "
                    "give this one another --name"
                )
            else:
                if fresh:
                    write_note(self._cluster, self._options.name, note)
                    if state["counts"] != (self._spec.least, self._spec.most):
                        _ask(found, "scale", self._spec.least, self._spec.most)
                return found
        check_place(self._spec)
        if fresh:
            forget_counts(self._spec)  # of an earlier cloud, which nobody stopped
        write_note(self._cluster, self._options.name, note)
        environment = {"OMP_NUM_THREADS": "1"}
        started = start_here(ClusterController, self._spec, name=name, environment=environment)
        try:
            _ask(started, "state", seconds=START_SECONDS)
        except IsthmusError:
            started.kill()
            raise
        return started

    def until_ready(self, stop: threading.Event, say: Callable[[str], None]) -> tuple[str, ...] | None:
        """Wait until the workers serve; returns their addresses, None where `stop` was set first.

        Raises UnreachableError where somebody has stopped the cloud meanwhile.
        """
        said: list[str] = []
        while not stop.is_set():
            state = _ask(self._controller, "state", seconds=LOST_SECONDS)
            if state["stopped"]:
                raise _stopped(self._options.name)
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

    def look_after(self, stop: threading.Event) -> bool:
        """Say what is wrong, and start the cloud again where its control store has lost it.

        Returns when `stop` is set, or somebody has stopped the cloud: True where the cloud goes on.
        """
        answered = heard = time.monotonic()
        while not stop.wait(POLL_SECONDS):
            now = time.monotonic()
            if is_open(self._cluster.control_store):
                heard = now
            elif now - heard > SILENT_SECONDS:
                log("control_store_lost", logging.ERROR)
                self._console.print("Ray's control store does not answer: waiting for the cluster", highlight=False)
                if not self._rejoin(stop):
                    return False
                answered = heard = time.monotonic()
                continue
            else:
                continue  # a question to Ray would wait for the control store
            try:
                state = _ask(self._controller, "state", seconds=POLL_SECONDS)
                answered = now
                if state["stopped"]:  # a `stop` is at it, or was broken off: it has no workers, and will start none
                    self._say_stopped()
                    return False
                alive = self._cluster.addresses()
                self.write_where(state, alive)
                self._tell([*state["faults"], *self._trust_faults(alive)])
            except IsthmusError:  # or it could not start
                with contextlib.suppress(UnreachableError):  # the next look asks again
                    if self._was_stopped():
                        return False
                if now - answered > LOST_SECONDS:
                    log("controller_lost", logging.ERROR)
                    self._console.print("the controller does not answer: looking for it anew", highlight=False)
                    if not self._rejoin(stop):
                        return False
                    answered = heard = time.monotonic()
        return True

    def _was_stopped(self) -> bool:
        """Whether `isthmus cloud stop` has ended the cloud, which is said then. Raises UnreachableError."""
        note = read_note(self._cluster, self._options.name)
        if note is None or not note.stopped:
            return False
        self._say_stopped()
        return True

    def _say_stopped(self) -> None:
        self._console.print(f"the cloud {self._options.name} was stopped", highlight=False)

    def _trust_faults(self, alive: Collection[str]) -> list[str]:
        """What `check_trust` finds wrong with the machines of now, as some join later."""
        try:
            check_trust(alive, autoscaled=self._options.autoscaled)
        except ConfigError as error:
            return [str(error)]
        return []

    def note_places(self, places: Iterable[str], connection_file: Path | None) -> None:
        """Note what `serve` has written: workers that serve at these places, and the other machines."""
        self._places = tuple(dict.fromkeys((*places, *self._spec.places)))
        self._connection_file = connection_file

    def write_where(self, state: Mapping[str, Any], alive: Collection[str]) -> None:
        """Write where the cloud serves, once it does, for `isthmus cloud status`, and anew when its machines change.

        A place whose worker is away for a moment stays for as long as its machine is one of those `alive`.
        """
        if not state["ready"]:
            return
        known = [place for place in (*self._spec.places, *self._places) if machines_of([place]) <= set(alive)]
        before, now = self._places, tuple(dict.fromkeys((*state["places"], *known)))
        if before and (self._spec.worker.advertise or machines_of(before) == machines_of(now)):
            return
        self._places = now
        try:
            written = write_serving(dataclasses.replace(self._spec, places=now), state["places"], self._connection_file)
        except DiskError as error:  # the cloud serves all the same
            self._console.print(str(error), highlight=False, markup=False)
            return
        if before and written is not None:
            self._console.print(_MOVED.format(file=self._connection_file or written), highlight=False, markup=False)

    def _tell(self, faults: Iterable[str]) -> None:
        current = list(faults)
        for line in current:
            if line not in self._faults:
                self._console.print(line, highlight=False, markup=False)
        self._faults = current

    def _rejoin(self, stop: threading.Event) -> bool:
        """Leave the cluster, join it again once it answers, and start what it has not. Errors are tried again.

        Returns False where somebody has stopped the cloud meanwhile.
        """
        self._cluster.leave()
        said = ""
        while not stop.is_set():
            try:
                self._cluster = JoinedCluster(self._options.address)
                stop_on_signals(stop)  # joining sets handlers of Ray's own
                if self._was_stopped():
                    return False
                self._controller = self._find_or_start()
            except IsthmusError as error:
                self._cluster.leave()
                if str(error) != said and not isinstance(error, UnreachableError):
                    said = str(error)
                    self._console.print(said, highlight=False, markup=False)
                stop.wait(REJOIN_SECONDS)
                continue
            self._console.print("the cluster answers again", highlight=False)
            log("cluster_joined_again")
            break
        return True

    def leave(self) -> None:
        """Leave the cluster, which goes on."""
        self._cluster.leave()


def _serving(name: str) -> tuple[Actor, dict[str, Any]]:
    """The controller of a cloud and its state. Raises UnreachableError where there is none, or it was stopped."""
    found = find_actor(controller_name(name))
    if found is None:
        raise _no_cloud(name)
    state: dict[str, Any] = _ask(found, "state")
    if state["stopped"]:
        raise _stopped(name)
    return found, state


def _stopped(name: str) -> UnreachableError:
    return UnreachableError(
        f"the cloud {name!r} was stopped by a command that is still at it, or was broken off: `isthmus cloud stop` "
        "ends what is left of it, and `isthmus cloud serve` starts it again"
    )


def _no_cloud(name: str) -> UnreachableError:
    return UnreachableError(f"there is no cloud {name!r} in this cluster: check --name, or `isthmus cloud serve` it")


def _ask(controller: Actor, method: str, *arguments: object, seconds: float = ANSWER_SECONDS) -> Any:
    """Ask the controller. Raises what the method raises, and UnreachableError where it does not answer."""
    try:
        return controller.ask(method, *arguments).result(seconds)
    except MethodError as error:
        raise error.cause from None
    except ActorGoneError as error:
        raise UnreachableError(f"the cloud's controller is gone: {error}") from None
    except ActorError as error:
        raise UnreachableError(
            f"the cloud's controller does not answer within {seconds:g} s ({error}): its node is busy or cut off; see "
            "`isthmus cloud doctor`, and run the command again"
        ) from None
