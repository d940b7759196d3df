"""A cloud over several machines that `serve` or `attach` looks after, from its owner's side.

It says what is wrong, writes down where the cloud serves, and starts it again where Ray's control store was lost and
came back with nothing in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from isthmus.cloud.cluster.cloud_records import machines_of, note_of, read_note, write_note, write_serving
from isthmus.cloud.cluster.cluster_controller import ClusterController
from isthmus.cloud.cluster.cluster_spec import ClusterSpec, controller_name, same_cloud
from isthmus.cloud.cluster.joined_cluster import JoinedCluster, start_here
from isthmus.cloud.cluster.planned_cluster import check_place
from isthmus.cloud.cluster.ray_tls import check_trust
from isthmus.cloud.cluster.worker_counts import forget_counts
from isthmus.cloud.control.cluster import is_open
from isthmus.cloud.control.ray_cluster import Actor, ActorError, ActorGoneError, MethodError, find_actor
from isthmus.cloud.control.serve_options import ClusterOptions
from isthmus.cloud.control.serve_state import STATE_FILE
from isthmus.cloud.control.stop_signals import stop_on_signals
from isthmus.cloud.telemetry.logs import log
from isthmus.common.errors import ConfigError, DiskError, IsthmusError, KeyFileError, UnreachableError

POLL_SECONDS = 2.0
"""Between two looks at the cloud, as on one machine, and for the controller to answer one: the next look asks again."""
ANSWER_SECONDS = 10.0
"""How long the controller may take to answer a command: beside a process that imports torch it answers late."""
SILENT_SECONDS = 30.0
"""For which Ray's control store may be silent before this process leaves it: after 60, by default, Ray would end the
process."""
LOST_SECONDS = 60.0
"""For which the controller may be silent, while the control store answers, before it is looked for anew.

Ray starts it again within seconds, and a machine that only is busy should not lose it."""
START_SECONDS = 60.0
"""For a new controller to answer first: its process imports torch, which takes 5 s where nothing else runs, and more on
a busy machine."""
REJOIN_SECONDS = 1.0
"""Between two attempts to join a cluster: each is a connection that is refused, or waited for."""
_MOVED = (
    "the cloud's machines have changed, and its connection string with them: the new one is in {file}, for the edges"
)


class WatchedCloud:
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
                state = ask(found, "state")
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
                        ask(found, "scale", self._spec.least, self._spec.most)
                return found
        check_place(self._spec)
        if fresh:
            forget_counts(self._spec)  # of an earlier cloud, which nobody stopped
        write_note(self._cluster, self._options.name, note)
        environment = {"OMP_NUM_THREADS": "1"}
        started = start_here(ClusterController, self._spec, name=name, environment=environment)
        try:
            ask(started, "state", seconds=START_SECONDS)
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
            state = ask(self._controller, "state", seconds=LOST_SECONDS)
            if state["stopped"]:
                raise stopped_error(self._options.name)
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
                what = "Ray's control store does not answer: waiting for the cluster"
                if not self._rejoin("control_store_lost", what, stop):
                    return False
                answered = heard = time.monotonic()
                continue
            else:
                continue  # a question to Ray would wait for the control store
            try:
                state = ask(self._controller, "state", seconds=POLL_SECONDS)
                answered = now
                if state["stopped"]:  # a `stop` is at it, or was broken off: it has no workers, and will start none
                    self._say_stopped()
                    return False
                alive = self._cluster.addresses()
                self._tell([*state["faults"], *self._trust_faults(alive), *self._write_where(state, alive)])
            except IsthmusError:  # or it could not start
                with contextlib.suppress(UnreachableError):  # the next look asks again
                    if self._was_stopped():
                        return False
                if now - answered > LOST_SECONDS:
                    what = "the controller does not answer: looking for it anew"
                    if not self._rejoin("controller_lost", what, stop):
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

    def write_first(self, places: Iterable[str], connection_file: Path | None) -> str:
        """Write where the workers serve, at these places; returns the connection string.

        Raises:
            DiskError: it cannot be written.
            KeyFileError: the owner's folder cannot be used.
        """
        places = tuple(places)
        self._places = tuple(dict.fromkeys((*places, *self._spec.places)))
        self._connection_file = connection_file
        return write_serving(self._spec, places, connection_file)

    def write_found(self, state: Mapping[str, Any]) -> None:
        """Write where a cloud serves that was found running."""
        self._tell(self._write_where(state, self._cluster.addresses()))

    def _write_where(self, state: Mapping[str, Any], alive: Collection[str]) -> list[str]:
        """Write where the cloud serves, once it does, for `isthmus cloud status`, and anew when its machines change.

        A place whose worker is away for a moment stays for as long as its machine is one of those `alive`.

        Returns what keeps it from that: one line, or none.
        """
        if not state["ready"]:
            return []
        known = [place for place in (*self._spec.places, *self._places) if machines_of([place]) <= set(alive)]
        before, now = self._places, tuple(dict.fromkeys((*state["places"], *known)))
        if before and (self._spec.worker.advertise or machines_of(before) == machines_of(now)):
            return []
        try:
            write_serving(dataclasses.replace(self._spec, places=now), state["places"], self._connection_file)
        except KeyFileError:
            return []  # the owner's folder is on another machine, or its keys cannot be read
        except DiskError as error:
            return [str(error)]
        self._places = now
        if before:
            file = self._connection_file or Path(self._spec.home) / STATE_FILE
            self._console.print(_MOVED.format(file=file), highlight=False, markup=False)
        return []

    def _tell(self, faults: Iterable[str]) -> None:
        current = list(faults)
        for line in current:
            if line not in self._faults:
                self._console.print(line, highlight=False, markup=False)
        self._faults = current

    def _rejoin(self, event: str, why: str, stop: threading.Event) -> bool:
        """Leave the cluster, join it again once it answers, and start what it has not. Errors are tried again.

        Args:
            event: for the log.
            why: for the operator.
            stop: ends it.

        Returns:
            False where somebody has stopped the cloud meanwhile.
        """
        log(event, logging.ERROR)
        self._console.print(why, highlight=False)
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


def stopped_error(name: str) -> UnreachableError:
    """For whoever needs a cloud that serves."""
    return UnreachableError(
        f"the cloud {name!r} was stopped by a command that is still at it, or was broken off: `isthmus cloud stop` "
        "ends what is left of it, and `isthmus cloud serve` starts it again"
    )


def ask(controller: Actor, method: str, *arguments: object, seconds: float = ANSWER_SECONDS) -> Any:
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
