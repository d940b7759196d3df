"""The controller: a Ray actor that keeps the directory of a cloud's workers.

Every half second it takes a report from each worker, and sends it those of the others. It serves `/status` and
`/metrics` for all of them, and decides when a worker is started or ended; the supervisor
(`isthmus.cloud.control.supervisor`) does that. It can ask the workers for all that it knows, so Ray may restart it at
any moment. Calls do not pass through it: while it is away, edges are served as before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isthmus.cloud.control.autoscaler import Change, Load, Scaler, since
from isthmus.cloud.control.ray_cluster import Actor, ActorError, ActorGoneError, Answer, find_actor, wait_for
from isthmus.cloud.directory import Peer, Rate, Report, Update, cloud_status, surplus
from isthmus.cloud.telemetry.logs import log, log_to
from isthmus.cloud.telemetry.metrics import merged, serve_metrics
from isthmus.common.errors import PortInUseError

TICK_SECONDS = 0.5
"""Between two rounds of questions to the workers, each of which takes them milliseconds: new sessions wait for one."""
ANSWER_SECONDS = 1.0
"""How long a round waits for answers; a worker that is slower keeps its last report."""
RATE_SECONDS = 5.0
"""The window over which tokens a second are averaged: several steps, and short enough to follow a change."""
SPREAD_SECONDS = 5.0
"""Between two moves of sessions: the sessions of the first one have arrived by then."""
REBINDS, REBIND_PAUSE = 10, 0.5
"""Further attempts to take a port that the process before this one may still hold, and the seconds between two."""


@dataclass(slots=True)
class _Entry:
    """What is known of a worker."""

    report: Report | None = None  # the last one
    answering: bool = False
    restarts: int = 0
    rate: Rate = field(default_factory=lambda: Rate(RATE_SECONDS))
    tokens_per_s: float = 0.0


class Directory:
    """What the workers have reported, and what follows from it. Pure, with an injected clock; not thread-safe.

    Args:
        clock: seconds that never go back.
        come_back: whether a worker that does not answer comes back at its address, so that edges should know of it.
    """

    def __init__(self, clock: Callable[[], float], *, come_back: bool = True) -> None:
        self._clock, self._come_back = clock, come_back
        self._entries: dict[int, _Entry] = {}
        self._uneven_since: float | None = None

    def reported(self, number: int, report: Report) -> None:
        """Take a worker's report."""
        entry = self._entries.setdefault(number, _Entry())
        if entry.report is None:
            entry.restarts = report.status["restarts"]
        elif entry.report.status["pid"] != report.status["pid"]:
            entry.restarts += 1
        entry.report, entry.answering = report, True
        entry.tokens_per_s = entry.rate.add(self._clock(), report.status["positions"])

    def missed(self, number: int) -> None:
        """Note that a worker has not answered: it is being started, or restarted."""
        self._entries.setdefault(number, _Entry()).answering = False

    def gone(self, number: int) -> None:
        """Note that there is no worker of this number."""
        self._entries.pop(number, None)

    def updates(self) -> dict[int, Update]:
        """What each worker is sent next.

        Sessions are moved only among workers that have addresses of their own. Before those that share one stands a
        load balancer, which spreads the connections.
        """
        serving = {number: peer for number, (peer, _) in self._serving().items()}
        count = Counter(peer.address for peer in serving.values())
        # An edge cannot choose among workers that share an address: it would come back to the one that it has left.
        move = surplus({number: len(peer.sessions) for number, peer in serving.items() if count[peer.address] == 1})
        now = self._clock()
        self._uneven_since = None if move is None else since(self._uneven_since, now)
        end_newest: dict[int, int] = {}
        if move is not None and self._uneven_since is not None and now - self._uneven_since >= SPREAD_SECONDS:
            end_newest, self._uneven_since = dict([move]), None
        return {
            number: Update(
                self._peers_of(number), end_newest.get(number, 0), None if entry.report is None else entry.restarts
            )
            for number, entry in self._entries.items()
        }

    def loads(self) -> dict[int, Load]:
        """The load of each worker that serves edges."""
        return {
            number: Load(status["queue_depth"], status["overdue"], len(peer.sessions))
            for number, (peer, status) in self._serving().items()
        }

    def status(self) -> dict[str, Any]:
        """The cloud's status; see `cloud_status`."""
        workers: list[Mapping[str, Any]] = []
        for number, entry in sorted(self._entries.items()):
            known = {} if entry.report is None else entry.report.status
            if entry.answering:
                own = {key: value for key, value in known.items() if key != "positions"}
                front = entry.report is not None and entry.report.peer is not None
                workers.append(
                    {**own, "front": front, "restarts": entry.restarts, "tokens_per_s": round(entry.tokens_per_s, 1)}
                )
            else:
                kept = {key: known[key] for key in ("address", "span") if key in known}
                workers.append({"worker": number, **kept, "state": "restarting", "restarts": entry.restarts})
        return cloud_status(workers)

    def _serving(self) -> dict[int, tuple[Peer, Mapping[str, Any]]]:
        return {
            number: (peer, entry.report.status)
            for number, entry in self._entries.items()
            if entry.answering and entry.report is not None and (peer := entry.report.peer) is not None and peer.serving
        }

    def _peers_of(self, number: int) -> tuple[Peer, ...]:
        """The other workers that edges may go to, also those that do not answer at present, where they come back.

        There are none for a pipeline's stage that edges do not talk to: the stage before it has nowhere else to go.
        """
        own = self._entries[number].report
        if own is None or own.peer is None:
            return ()
        return tuple(
            peer if entry.answering else Peer(peer.address, "restarting")
            for other, entry in sorted(self._entries.items())
            if other != number
            and entry.report is not None
            and (peer := entry.report.peer) is not None
            and (entry.answering or self._come_back)
        )


@dataclass(frozen=True, slots=True)
class ControllerSpec:
    """All that a controller needs to start, and to start again."""

    workers: tuple[str, ...]  # the actors' names, by number; an actor may be yet to be started
    least: int  # workers that there are at least
    metrics: str  # host:port of /status and /metrics, or "" for none
    log_file: str  # "" for standard error


class Controller:
    """Keeps the directory. Made into an actor by `isthmus.cloud.control.cluster`."""

    def __init__(self, spec: ControllerSpec) -> None:
        log_to(Path(spec.log_file) if spec.log_file else None)
        self._spec = spec
        self._directory = Directory(time.monotonic)
        self._scaler = Scaler(spec.least, len(spec.workers), time.monotonic)
        self._actors: dict[int, Actor] = {}
        self._asked: dict[int, Answer] = {}  # by worker: the report that was asked for and has not come
        self._lock = threading.Lock()
        self._failure: PortInUseError | None = None
        self._poll()
        try:
            serve_pages(spec.metrics, self.metrics, self.status)
        except PortInUseError as error:
            self._failure = error  # raised by `ready`: of an actor that dies in its constructor, Ray keeps only a text
        threading.Thread(target=self._run, name="controller", daemon=True).start()

    def ready(self) -> int:
        """This process's id; answering means that the controller is at work.

        Raises PortInUseError where it cannot serve `/status`.
        """
        if self._failure is not None:
            raise self._failure
        return os.getpid()

    def change(self) -> Change | None:
        """What the supervisor is to change about the number of workers; to be asked every second or so."""
        with self._lock:
            return self._scaler.decide(self._directory.loads())

    def status(self) -> dict[str, Any]:
        """What `isthmus cloud status` shows, as of now."""
        self._poll()
        with self._lock:
            return {**self._directory.status(), "controller_pid": os.getpid()}

    def metrics(self) -> bytes:
        """The metrics of the workers that answer, in Prometheus' text format."""
        with self._lock:
            actors = dict(self._actors)
        return metrics_of(actors)

    def _run(self) -> None:
        while True:
            time.sleep(TICK_SECONDS)
            self._poll()

    def _poll(self) -> None:
        """Send every worker its update, and take the workers' reports."""
        with self._lock:
            self._find_workers()
            updates = self._directory.updates()
            for number, actor in self._actors.items():
                if number not in self._asked:  # a worker that is being restarted may answer late
                    self._asked[number] = actor.ask("exchange", updates.get(number, Update()))
            wait_for(self._asked.values(), ANSWER_SECONDS)
            for number, answer in list(self._asked.items()):
                if not answer.is_ready():
                    self._directory.missed(number)
                    continue
                del self._asked[number]
                try:
                    self._directory.reported(number, answer.result(0))
                except ActorGoneError:  # for good: the supervisor has ended it
                    del self._actors[number]
                    self._directory.gone(number)
                except ActorError:
                    self._directory.missed(number)

    def _find_workers(self) -> None:
        """Look for workers that were not there before."""
        for number, name in enumerate(self._spec.workers):
            if number not in self._actors:
                actor = find_actor(name)
                if actor is not None:
                    self._actors[number] = actor


def metrics_of(actors: Mapping[int, Actor]) -> bytes:
    """The metrics of the workers that answer soon, in Prometheus' text format."""
    answers = {str(number): actor.ask("metrics") for number, actor in actors.items()}
    wait_for(answers.values(), ANSWER_SECONDS)
    texts = {}
    for number, answer in answers.items():
        with contextlib.suppress(ActorError):
            texts[number] = answer.result(0)
    return merged(texts) if texts else b""


def serve_pages(address: str, metrics: Callable[[], bytes], status: Callable[[], dict[str, Any]]) -> None:
    """Serve `/metrics` and `/status` at `host:port`; at "" nowhere.

    A restarted controller tries again, as the process before it may hold the port for a moment more.

    Raises:
        PortInUseError: somebody else has it.
    """
    if not address:
        return
    host, _, port = address.rpartition(":")
    for left in range(REBINDS, -1, -1):
        try:
            serve_metrics(host.strip("[]"), int(port), metrics, status)
            return
        except PortInUseError as error:
            if not left:
                raise
            log("metrics_port_still_taken", logging.WARNING, error=str(error))
            time.sleep(REBIND_PAUSE)
