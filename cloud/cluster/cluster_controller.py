"""The controller of a cloud over several machines: a detached actor on the node where its owner's folder is.

It does what `serve` and the controller of one machine do together: it starts the workers, gives them certificates and
whatever else they need, keeps the directory of them, and scales, drains and ends them. Calls do not pass through it:
while it is away, edges are served as before. It can ask the workers for all that it knows, but for how many there
should be, which is in a file of the owner's folder; so Ray may restart it at any moment.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from isthmus.cloud.cluster.cluster_spec import ClusterSpec
from isthmus.cloud.cluster.issuing import HOUR, IssuingOffice, TenantsText
from isthmus.cloud.cluster.joined_cluster import named_actors, start_anywhere
from isthmus.cloud.cluster.known_workers import KnownWorkers
from isthmus.cloud.cluster.model_files import ModelFiles
from isthmus.cloud.cluster.worker_counts import forget_counts, read_counts, write_counts
from isthmus.cloud.control.autoscaler import Scaler
from isthmus.cloud.control.controller import Directory, metrics_of, serve_pages
from isthmus.cloud.control.ray_cluster import Actor, ActorError, ActorGoneError, Answer, wait_for, was_restarted
from isthmus.cloud.directory import Update
from isthmus.cloud.nodes.deliveries import Delivery, NodeReport, newer_adapters
from isthmus.cloud.nodes.node_worker import NodeWorker, spec_digest
from isthmus.cloud.telemetry.current_faults import CurrentFaults
from isthmus.cloud.telemetry.logs import log, log_to
from isthmus.common.errors import IsthmusError, NotEnrolledError, PortInUseError
from isthmus.common.readable import date
from isthmus.protocol.enrolment import REVOKED_FILE
from isthmus.protocol.limits import MAX_WORKERS

TICK_SECONDS, SETTLING_SECONDS = 0.5, 0.1
"""Between two rounds of questions to the workers, and while one of them settles, which takes it a few rounds."""
ANSWER_SECONDS = 1.0
"""How long a round waits for answers; a worker that is slower keeps its last report."""
RETRY_SECONDS = 10.0
"""Until a worker that has failed is started again: its cause may pass, and Ray may place it elsewhere."""
HEAR_SECONDS = 10.0
"""After its start, for which a controller waits for reports of all workers before it changes lists that some have."""
DRAIN_SLACK_SECONDS = 10.0
"""Beyond the grace, for a worker to say that it has drained."""
PLACE_SECONDS = 120.0
"""For Ray to place a worker that there need not be: an autoscaler's machine has started by then, or there is none."""
PORT_SECONDS = 300.0
"""For which a controller that Ray has started again does without a port that is taken, before it starts once more."""
ISSUER_CHECK_SECONDS = 30.0
"""Between two looks at when the issuer's certificate runs out, which the controller says a day before."""


class ClusterController:
    """Looks after one cloud. Made into an actor by `isthmus.cloud.cluster.attached`."""

    def __init__(self, spec: ClusterSpec) -> None:
        self._home = Path(spec.home)
        log_to(self._home / "controller.log")
        self._spec = spec
        self._lock = threading.RLock()
        self._directory = Directory(time.monotonic, come_back=False)
        self._office = IssuingOffice(self._home, spec.hours)
        self._tenants, self._revoked = TenantsText(self._home), TenantsText(self._home, REVOKED_FILE)
        self._actors: dict[int, Actor] = {}
        self._asked: dict[int, Answer] = {}  # by worker: the report that was asked for and has not come
        self._reports: dict[int, NodeReport] = {}  # the last one of each
        self._silent: set[int] = set()  # workers that have not answered in the last round
        self._known = KnownWorkers(self._office, spec.worker.root)
        self._adopted = False  # the workers of an earlier controller
        self._digest_of = cache(lambda number: spec_digest(spec.worker_spec(number)))
        self._retry_at: dict[int, float] = {}
        self._wanted_since: dict[int, float] = {}
        self._begun = time.monotonic()
        self._issuer_checked = float("-inf")
        self._draining: dict[int, Answer] = {}
        self._faults = CurrentFaults()  # what keeps the cloud from serving
        self._stopped = False
        self._least, self._most = read_counts(spec)
        self._wanted = set(range(self._least))
        self._scaler = Scaler(self._least, self._most, time.monotonic)
        self._failure: PortInUseError | None = None
        self._issuer_until: int | None = None
        self._files_at = ""
        self._files = ModelFiles(spec, self._office, self._known.keys)
        taken: list[PortInUseError] = []
        try:
            self._files_at = self._files.start()
        except PortInUseError as error:
            taken.append(error)
        try:
            serve_pages(spec.metrics, self.metrics, self.status)
        except PortInUseError as error:
            taken.append(error)
        if taken and not was_restarted():
            self._failure = taken[0]  # raised by `state`: of an actor that dies in its constructor, Ray keeps a text
            return
        if taken:  # nobody waits to be told, and the workers need their certificates more than this needs the port
            said = "; ".join(map(str, taken))
            self._faults.note("ports", f"{said}; the controller starts again in {PORT_SECONDS / 60:.0f} minutes")
            threading.Thread(target=self._end_later, name="ports", daemon=True).start()
        rounds = (self._round, self._scale, self._look_at_the_issuer)
        threading.Thread(target=self._run, args=rounds, name="rounds", daemon=True).start()
        # Beside the rounds: while Ray's head is away, Ray answers late.
        threading.Thread(target=self._run, args=(self._adopt, self._start_missing), name="starts", daemon=True).start()

    # What the owner's commands ask ------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """How far the start is, and what is wrong.

        Returns:
            `ready`, whether all workers that there are at least serve; `waits`, a line for each that does not;
            `faults`, lines for the operator; `places`, addresses of the workers that serve; `counts`, the least and the
            largest number of workers; `spec`, what it was made with; `stopped`, whether `stop` has begun.

        Raises:
            PortInUseError: it cannot serve `/status`.
        """
        if self._failure is not None:
            raise self._failure
        with self._lock:
            waits = [f"worker {number}: {self._waits(number)}" for number in sorted(self._wanted)]
            serving = {number for number in self._wanted if not self._waits(number)}
            front = [number for number in sorted(serving) if not self._spec.is_inner(number)]
            return {
                "ready": len(serving) >= self._least,
                "waits": [line for line in waits if not line.endswith(": ")],
                "faults": self._faults.lines(),
                "places": [self._reports[number].place for number in front],
                "counts": (self._least, self._most),
                "spec": self._spec,
                "stopped": self._stopped,
            }

    def scale(self, least: int, most: int) -> None:
        """Have between `least` and `most` workers from now on. Those above are drained, the highest numbers first."""
        with self._lock:
            self._least, self._most = least, most
            write_counts(self._spec, least, most)
            self._scaler = Scaler(least, most, time.monotonic)
            self._wanted = {number for number in self._wanted if number < most} | set(range(least))
        log("scaled", least=least, most=most)

    def stop(self, grace: float) -> bool:
        """Drain and end all workers; True if every call in flight was answered.

        The stages of a pipeline end one after the other: the first one's calls need those behind it.
        """
        named = named_actors(self._spec.worker_name)  # before anything is changed: Ray may not answer
        with self._lock:
            self._stopped = True
            self._wanted = set()
            actors = {**named, **self._actors}
        inner = [[number] for number in sorted(actors) if self._spec.is_inner(number)]
        finished = True
        for turn in ([number for number in actors if not self._spec.is_inner(number)], *inner):
            answers = [actors[number].ask("drain", grace) for number in turn]
            deadline = time.monotonic() + grace + DRAIN_SLACK_SECONDS
            for answer in answers:
                try:
                    finished = bool(answer.result(max(0.0, deadline - time.monotonic()))) and finished
                except ActorError:
                    finished = False
        for actor in actors.values():
            actor.kill()
        forget_counts(self._spec)
        log("stopped", all_answered=finished)
        return finished

    def status(self) -> dict[str, Any]:
        """What `isthmus cloud status` shows, as of the last round."""
        with self._lock:
            shown = self._directory.status()
            for worker in shown["workers"]:
                report = self._reports.get(worker["worker"])
                if report is not None:
                    worker["node"] = report.node
            faults = {"faults": lines} if (lines := self._faults.lines()) else {}
            return {**shown, "renewed_until": self._issuer_until, **faults, "controller_pid": os.getpid()}

    def metrics(self) -> bytes:
        """The metrics of the workers that answer, in Prometheus' text format."""
        with self._lock:
            actors = dict(self._actors)
        return metrics_of(actors)

    # What it does by itself -------------------------------------------------------------------------------------------

    def _run(self, *steps: Callable[[], None]) -> None:
        while not self._stopped:
            for step in steps:
                try:
                    step()
                except Exception as error:  # noqa: BLE001  # nobody would see it, and the next round may do better
                    log("round_failed", logging.ERROR, step=step.__name__, error=f"{type(error).__name__}: {error}")
            with self._lock:
                settling = any(self._waits(number) for number in self._wanted)
            time.sleep(SETTLING_SECONDS if settling else TICK_SECONDS)

    def _end_later(self) -> None:
        """End this process after a while, for Ray to start it again: a port that was taken may be free then."""
        time.sleep(PORT_SECONDS)
        if not self._stopped:  # which answers whoever has asked for it
            os._exit(1)

    def _adopt(self) -> None:
        """Take up the workers of an earlier controller. Those above the largest number will be drained."""
        if self._adopted:
            return
        found = named_actors(self._spec.worker_name)
        with self._lock:
            self._actors = {**found, **self._actors}
            self._wanted |= {number for number in found if number < self._most}
            self._adopted = True

    def _start_missing(self) -> None:
        """Start the workers that there should be and are not."""
        spec, now = self._spec, time.monotonic()
        with self._lock:
            missing = [
                number
                for number in sorted(self._wanted)
                if number not in self._actors and self._retry_at.get(number, 0.0) <= now
            ]
        for number in missing:
            own, name = spec.worker_spec(number), spec.worker_name(number)
            actor = start_anywhere(NodeWorker, own, name=name, environment=spec.environment, claims=spec.claims)
            with self._lock:
                if self._stopped:  # meanwhile, without this one
                    actor.kill()
                    return
                self._actors[number] = actor

    def _round(self) -> None:
        """Send every worker its update and what is new for it, and take the workers' reports."""
        with self._lock:
            self._known.forget_revoked()
            tenants = self._tenants()
            self._faults.note("authorized_edges", self._tenants.fault)
            revoked = self._revoked()
            self._faults.note(REVOKED_FILE, self._revoked.fault)
            self._faults.note("authorized_nodes", self._office.fault)
            updates = self._directory.updates()
            for number, actor in self._actors.items():
                if number not in self._asked:  # a worker that is being restarted may answer late
                    update, delivery = updates.get(number, Update()), self._delivery(number, tenants, revoked)
                    new = delivery if self._is_due(number, delivery) else None
                    self._asked[number] = actor.ask("exchange", update, new)
            asked = dict(self._asked)
        wait_for(asked.values(), ANSWER_SECONDS)
        with self._lock:
            for number, answer in asked.items():
                if not answer.is_ready():
                    self._missed(number)
                    continue
                self._asked.pop(number, None)
                try:
                    self._took(number, answer.result(0))
                except ActorGoneError as error:  # for good: a head that came back has forgotten it, say
                    log("worker_gone", logging.WARNING, worker=number, error=str(error))
                    if number not in self._reports:  # it never came up: another version on that node, say
                        self._faults.note(f"worker {number}", f"worker {number} could not be started: {error}")
                        self._retry_at[number] = time.monotonic() + RETRY_SECONDS
                    self._forget(number)
                except ActorError:
                    self._missed(number)

    def _missed(self, number: int) -> None:
        self._directory.missed(number)
        self._silent.add(number)

    def _forget(self, number: int) -> None:
        self._actors.pop(number, None)
        self._asked.pop(number, None)
        self._reports.pop(number, None)
        self._known.forget(number)
        self._silent.discard(number)
        self._draining.pop(number, None)
        self._directory.gone(number)
        self._faults.note(f"worker {number}'s disk", "")

    def _took(self, number: int, report: NodeReport) -> None:
        self._reports[number] = report
        self._silent.discard(number)
        self._directory.reported(number, report.report)
        what = f"worker {number}"
        if report.failure:
            self._faults.note(what, f"{what} on {report.node} cannot serve: {report.failure}")
            self._start_again(number)
            return
        self._faults.note(f"{what}'s disk", f"{what} on {report.node}: {report.fault}" if report.fault else "")
        try:
            self._known.take(number, report)
            self._faults.note(what, "")
        except NotEnrolledError as error:  # or not any more
            self._faults.note(what, f"{what} on {report.node} may not serve: {error}")
            self._start_again(number)
        except IsthmusError as error:
            self._faults.note(what, f"{what} on {report.node} gets no certificate: {error}")

    def _is_due(self, number: int, delivery: Delivery) -> bool:
        """Whether a worker is sent a delivery now.

        One that has a delivery of an earlier controller keeps it until all have been heard: what is not known yet would
        be taken from it, another stage's key or address, say.
        """
        report = self._reports.get(number)
        if report is None or report.revision == delivery.revision:
            return False
        all_heard = self._adopted and self._wanted <= set(self._reports)
        heard = all_heard or time.monotonic() - self._begun > HEAR_SECONDS
        return heard or not report.revision

    def _look_at_the_issuer(self) -> None:
        """Warn in time of the issuer's certificate, with which all others end."""
        if time.monotonic() - self._issuer_checked < ISSUER_CHECK_SECONDS:
            return
        self._issuer_checked = time.monotonic()
        try:
            self._issuer_until = self._office.issuer().certificate.not_after
        except IsthmusError as error:
            self._faults.note("issuer", str(error))
            return
        soon = self._issuer_until - time.time() < max(self._spec.hours, 24) * HOUR
        until = f"the issuer's certificate expires on {date(self._issuer_until)}, and all workers' with it"
        self._faults.note("issuer", f"{until}: renew it with `isthmus cloud issuer`" if soon else "")

    def _start_again(self, number: int) -> None:
        """End a worker, and have it started anew in a while, on a node of Ray's choice."""
        self._retry_at[number] = time.monotonic() + RETRY_SECONDS
        actor = self._actors[number]
        self._forget(number)
        actor.kill()

    def _waits(self, number: int) -> str:
        """What a worker waits for before it serves; "" where it serves."""
        report = self._reports.get(number)
        if report is None:
            return self._faults.of(f"worker {number}") or "a node with room for it"
        if self._is_outdated(number, report):
            return "the end of a worker from before"
        return "an answer" if number in self._silent else report.failure or report.waits

    def _is_outdated(self, number: int, report: NodeReport) -> bool:
        """Whether a wanted worker takes no sessions any more, or serves something else: an earlier controller's."""
        drains = report.report.status.get("state") == "draining"
        return drains or report.spec not in ("", self._digest_of(number))

    def _delivery(self, number: int, tenants: str | None, revoked: str | None) -> Delivery:
        """What a worker needs now."""
        # A stage that is silent for a moment keeps its place: its neighbours need neither its key nor its address anew.
        serving = {n: r for n, r in self._reports.items() if not r.waits and not r.failure}
        own = self._reports.get(number)
        behind = serving.get(number + 1) if self._spec.stages else None
        having = [n for n in sorted(serving) if serving[n].has_model and n != number and n not in self._silent]
        return Delivery(
            self._known.certificate(number),
            "" if self._spec.is_inner(number) else tenants,
            self._known.lines_beside(number),
            "" if behind is None else behind.place,
            (*([self._files_at] if self._files_at else []), *(serving[n].place for n in having)),
            newer_adapters(serving, own, tenants or "") if own is not None and not self._spec.stages else (),
            revoked,
        )

    def _scale(self) -> None:
        """Finish the drains that were begun, and do what the load asks for. Returns soon."""
        with self._lock:
            if self._stopped:  # which drains by itself
                return
            for number, answer in list(self._draining.items()):
                if answer.is_ready():
                    actor = self._actors.get(number)
                    self._forget(number)
                    if actor is not None:
                        actor.kill()
                    self._retry_at[number] = time.monotonic() + ANSWER_SECONDS  # Ray has forgotten its name by then
                    log("worker_ended", worker=number)
            self._give_up_unplaced()
            for number in set(range(MAX_WORKERS)) - self._wanted - set(self._actors):
                self._faults.note(f"worker {number}", "")
            for number in sorted(set(self._actors) - self._wanted - set(self._draining), reverse=True):
                self._draining[number] = self._actors[number].ask("drain", self._spec.grace)
            for number in sorted((self._wanted & self._reports.keys()) - self._draining.keys()):
                if self._is_outdated(number, self._reports[number]):
                    log("worker_outdated", logging.WARNING, worker=number)
                    self._draining[number] = self._actors[number].ask("drain", self._spec.grace)
            if self._spec.stages or self._draining or any(self._waits(number) for number in self._wanted):
                return  # one thing at a time
            change = self._scaler.decide(self._directory.loads())
            if change is not None:
                (self._wanted.add if change.start else self._wanted.discard)(change.number)
                log("worker_wanted" if change.start else "worker_not_wanted", worker=change.number)

    def _give_up_unplaced(self) -> None:
        """Want a worker no more that there need not be, and that Ray has found no place for."""
        now = time.monotonic()
        for number in [number for number in self._wanted if number >= self._least and number not in self._reports]:
            if now - self._wanted_since.setdefault(number, now) > PLACE_SECONDS:
                log("worker_not_placed", logging.WARNING, worker=number)
                self._wanted.discard(number)
                actor = self._actors.get(number)
                self._forget(number)
                if actor is not None:
                    actor.kill()
        self._wanted_since = {n: at for n, at in self._wanted_since.items() if n in self._wanted - self._reports.keys()}
