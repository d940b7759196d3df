"""The controller: a Ray actor that keeps the directory of a cloud's workers.

Every half second it asks each worker how it is, and tells it of the others. It serves `/status` and `/metrics` for all
of them, and says when a worker is to be started or ended; the supervisor (`isthmus.cloud.control.supervisor`) does it.
It knows nothing that it could not ask the workers, so Ray may restart it at any moment. Calls do not pass through it:
while it is away, edges are served as before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isthmus.cloud.control.autoscaler import Change, Load, Scaler
from isthmus.cloud.directory import Peer, Rate, Report, Word, cloud_status, surplus
from isthmus.cloud.telemetry.logs import log, log_to
from isthmus.cloud.telemetry.metrics import merged, serve_metrics
from isthmus.common.errors import PortInUseError

TICK_SECONDS = 0.5
ANSWER_SECONDS = 1.0
RATE_SECONDS = 5.0
SPREAD_SECONDS = 5.0
"""Between two moves of sessions: those that move have arrived by then."""
REBINDS, REBIND_PAUSE = 10, 0.5


@dataclass(slots=True)
class _Entry:
    """What is known of a worker."""

    report: Report | None = None  # the last one
    answering: bool = False
    restarts: int = 0
    rate: Rate = field(default_factory=lambda: Rate(RATE_SECONDS))
    tokens_per_s: float = 0.0


class Roster:
    """The directory itself. Pure, with an injected clock; not for several threads at once.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._entries: dict[int, _Entry] = {}
        self._uneven_since: float | None = None

    def took(self, number: int, report: Report) -> None:
        """A worker has answered."""
        entry = self._entries.setdefault(number, _Entry())
        if entry.report is None:
            entry.restarts = report.status["restarts"]
        elif entry.report.status["pid"] != report.status["pid"]:
            entry.restarts += 1
        entry.report, entry.answering = report, True
        entry.tokens_per_s = entry.rate.add(self._clock(), report.status["positions"])

    def missed(self, number: int) -> None:
        """A worker has not answered: it is being started, or again."""
        self._entries.setdefault(number, _Entry()).answering = False

    def gone(self, number: int) -> None:
        """There is no worker of this number."""
        self._entries.pop(number, None)

    def words(self) -> dict[int, Word]:
        """What each worker is to be told next."""
        move = surplus({number: len(peer.seats) for number, (peer, _) in self._serving().items()})
        now = self._clock()
        self._uneven_since = None if move is None else _since(self._uneven_since, now)
        shed: dict[int, int] = {}
        if move is not None and self._uneven_since is not None and now - self._uneven_since >= SPREAD_SECONDS:
            shed, self._uneven_since = dict([move]), None
        return {
            number: Word(self._peers_of(number), shed.get(number, 0), None if entry.report is None else entry.restarts)
            for number, entry in self._entries.items()
        }

    def loads(self) -> dict[int, Load]:
        """What the workers that serve edges have to do."""
        return {
            number: Load(status["queue_depth"], status["overdue"], len(peer.seats))
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
        """The others that edges may go to, those that do not answer at present as well: they come back.

        None for a stage that edges do not talk to: who talks to it has nowhere else to go.
        """
        own = self._entries[number].report
        if own is None or own.peer is None:
            return ()
        return tuple(
            peer if entry.answering else Peer(peer.address, "restarting")
            for other, entry in sorted(self._entries.items())
            if other != number and entry.report is not None and (peer := entry.report.peer) is not None
        )


def _since(begun: float | None, now: float) -> float:
    return now if begun is None else begun


@dataclass(frozen=True, slots=True)
class ControllerSpec:
    """All that a controller needs to start, and to start again."""

    workers: tuple[str, ...]  # the actors' names by number; there may be none of a name at present
    namespace: str
    least: int  # workers that there always are
    metrics: str  # host:port of /status and /metrics, or "" for none
    log_file: str  # "" for standard error


class Controller:
    """Keeps the directory. Made into an actor by `isthmus.cloud.control.supervisor`."""

    def __init__(self, spec: ControllerSpec) -> None:
        log_to(Path(spec.log_file) if spec.log_file else None)
        self._spec = spec
        self._roster = Roster(time.monotonic)
        self._scaler = Scaler(spec.least, len(spec.workers), time.monotonic)
        self._actors: dict[int, Any] = {}
        self._asked: dict[int, Any] = {}  # questions that wait for an answer, by worker
        self._lock = threading.Lock()
        self._failure: PortInUseError | None = None
        self._look()
        try:
            self._serve_metrics()
        except PortInUseError as error:
            self._failure = error  # told by `ready`: of an actor that dies in its constructor, Ray keeps only a text
        threading.Thread(target=self._run, name="controller", daemon=True).start()

    def ready(self) -> int:
        """This process's id; answering means that the controller is at work.

        Raises PortInUseError where it cannot serve `/status`.
        """
        if self._failure is not None:
            raise self._failure
        return os.getpid()

    def change(self) -> Change | None:
        """What the supervisor is to do about the number of workers; to be asked every second or so."""
        with self._lock:
            return self._scaler.decide(self._roster.loads())

    def status(self) -> dict[str, Any]:
        """What `isthmus cloud status` shows, as of now."""
        self._look()
        with self._lock:
            return {**self._roster.status(), "controller_pid": os.getpid()}

    def metrics(self) -> bytes:
        """The metrics of the workers that answer, in Prometheus' text format."""
        import ray

        with self._lock:
            questions = {str(number): actor.metrics.remote() for number, actor in self._actors.items()}
        if questions:
            ray.wait(list(questions.values()), num_returns=len(questions), timeout=ANSWER_SECONDS)
        texts = {}
        for number, question in questions.items():
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                texts[number] = ray.get(question, timeout=0)
        return merged(texts) if texts else b""

    def _run(self) -> None:
        while True:
            time.sleep(TICK_SECONDS)
            self._look()

    def _look(self) -> None:
        """Exchange words with every worker."""
        import ray

        with self._lock:
            self._find()
            words = self._roster.words()
            for number, actor in self._actors.items():
                if number not in self._asked:  # one that is being restarted may answer late
                    self._asked[number] = actor.exchange.remote(words.get(number, Word()))
            asked = list(self._asked.values())
            if asked:
                ray.wait(asked, num_returns=len(asked), timeout=ANSWER_SECONDS)
            for number, question in list(self._asked.items()):
                try:
                    self._roster.took(number, ray.get(question, timeout=0))
                except TimeoutError:  # Ray's own kind of it too
                    self._roster.missed(number)
                    continue
                except ray.exceptions.ActorDiedError:  # for good: the supervisor has ended it
                    del self._actors[number]
                    self._roster.gone(number)
                except ray.exceptions.RayError:
                    self._roster.missed(number)
                del self._asked[number]

    def _find(self) -> None:
        """Look for workers that were not there before."""
        import ray

        for number, name in enumerate(self._spec.workers):
            if number not in self._actors:
                with contextlib.suppress(ValueError):  # there is none of this name
                    self._actors[number] = ray.get_actor(name, namespace=self._spec.namespace)

    def _serve_metrics(self) -> None:
        """Serve; a restarted controller tries again, as the process before it may hold the port for a moment more."""
        if not self._spec.metrics:
            return
        host, _, port = self._spec.metrics.rpartition(":")
        for left in range(REBINDS, -1, -1):
            try:
                serve_metrics(host.strip("[]"), int(port), self.metrics, self.status)
                return
            except PortInUseError as error:
                if not left:
                    raise
                log("metrics_port_still_taken", logging.WARNING, error=str(error))
                time.sleep(REBIND_PAUSE)
