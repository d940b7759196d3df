"""A cloud's actors: the workers and the controller are started, watched, scaled, drained and ended here."""

from __future__ import annotations

import enum
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.cloud.control.autoscaler import Change
from isthmus.cloud.control.controller import Controller, ControllerSpec
from isthmus.cloud.control.ray_cluster import Actor, ActorError, ActorGoneError, Answer, MethodError, RayCluster
from isthmus.cloud.control.worker import CUDA, Worker, WorkerSpec, no_gpu
from isthmus.cloud.engine.freed_memory import wiping
from isthmus.cloud.telemetry.logs import log, log_file, log_to
from isthmus.common.errors import ConfigError, IsthmusError

ANSWER_SECONDS = 10.0
"""How long an actor may take to answer, or to end, before it counts as gone: longer than torch takes to import."""
CONNECT_SECONDS = 1.0
"""How long Ray's control store, on this machine, may take to accept a connection before it counts as silent."""
SILENT_POLLS = 3
"""Polls in a row that Ray's control store may leave unanswered."""
LEAVE_SECONDS, LEAVE_PAUSE = 30.0, 0.2
"""How long Ray's processes may take to end, several times what a busy machine needs, and how often that is checked."""

# glibc gives memory back to the kernel and takes it again at every large message unless it is told not to (20 times
# slower). It gives each thread an arena of its own, and memory that one thread takes and another frees would lie idle
# in each. MKL keeps buffers of its products, of each thread and shape, for good; a product's bits are the same without.
# Idle OpenMP threads of one process spin on the cores that the other needs.
WORKER_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MKL_DISABLE_FAST_MM": "1",
    "OMP_WAIT_POLICY": "passive",
}


class ControlStoreLostError(Exception):
    """Ray's control store does not answer any more; never shown to anybody."""


class State(enum.Enum):
    """What a worker does."""

    STARTING = enum.auto()
    """It loads its model."""
    RUNNING = enum.auto()
    DRAINING = enum.auto()
    """It finishes its calls, and is ended then."""


@dataclass(slots=True)
class _Worker:
    actor: Actor
    state: State
    answer: Answer  # while it is starting or draining: ready when it has started, or is drained


class Serving:
    """Running workers, their controller, and the Ray that they run in.

    Args:
        specs: what each worker serves, by number; their `listen` have fixed ports.
        home: the cloud's folder.
        ray_folder: where Ray keeps its files.
        least: how many of the workers are started at once; the others when they are needed.
        metrics: where the controller serves `/status` and `/metrics`; "" for nowhere.
        grace: seconds that calls in flight get when a worker is ended because it is not needed.
        say: told of each phase of the start.
    """

    def __init__(
        self,
        specs: Sequence[WorkerSpec],
        home: Path,
        ray_folder: Path,
        *,
        least: int,
        metrics: str,
        grace: float,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._specs, self._grace, self._say = specs, grace, say
        self._least, self._metrics, self._home, self._ray_folder = least, metrics, home, ray_folder
        log_to(log_file(home, "serve"))
        self._begin()

    def _begin(self) -> None:
        """Start Ray, and the actors."""
        self._workers: dict[int, _Worker] = {}
        self._controller: Actor | None = None
        self._silent = 0  # polls in a row that the control store has left unanswered
        self._say("starting Ray")
        self._cluster = RayCluster(self._home, self._ray_folder)
        self._names = [f"worker-{spec.number}" for spec in self._specs]
        on_gpus = [number for number in range(self._least) if self._specs[number].device == CUDA]
        if on_gpus:
            if not self._cluster.has_gpus:
                raise no_gpu(CUDA)
            self._cluster.reserve_gpus(on_gpus)
        self._say(f"starting {self._least} worker{'' if self._least == 1 else 's'}, each of which loads its layers")
        for number in range(self._least):
            self._start(number)
        for done, worker in enumerate(self._workers.values(), 1):
            _result(worker.answer)
            worker.state = State.RUNNING
            self._say(f"worker {done} of {self._least} is ready")
        spec = ControllerSpec(tuple(self._names), self._least, self._metrics, str(log_file(self._home, "controller")))
        self._controller = self._cluster.start(
            Controller, spec, name="controller", environment={"OMP_NUM_THREADS": "1"}
        )
        _result(self._controller.ask("ready"))

    def tend(self) -> None:
        """Look after the cluster and the number of workers; to be called every second or two.

        Raises:
            ControlStoreLostError: Ray's control store is gone. Without it Ray ends all its processes within a minute.
        """
        self._silent = 0 if is_open(self._cluster.control_store) else self._silent + 1
        if self._silent >= SILENT_POLLS:
            raise ControlStoreLostError
        if self._least < len(self._specs):
            self._scale()

    def restart(self) -> None:
        """Start the cluster again after its control store was lost."""
        log("control_store_lost", logging.ERROR)
        self._workers, self._controller = {}, None
        self._cluster.shutdown()  # and not `close`, which would ask the control store
        deadline = time.monotonic() + LEAVE_SECONDS  # the workers' processes end when they notice that Ray has ended
        listening = [spec.listen for spec in self._specs] + ([self._metrics] if self._metrics else [])
        while any(is_open(_split(listen)) for listen in listening) and time.monotonic() < deadline:
            time.sleep(LEAVE_PAUSE)
        self._begin()
        log("cluster_started_again")

    def budgets(self) -> list[str]:
        """A line on the memory that each worker's forward states and calls may take."""
        asked = [worker.actor.ask("budgets") for _, worker in sorted(self._workers.items())]
        return [_result(line) for line in asked]

    def _scale(self) -> None:
        """Finish the starts and drains that were begun, then do what the controller asks for. Returns soon."""
        for number, worker in list(self._workers.items()):
            if worker.state == State.RUNNING or not worker.answer.is_ready():
                continue
            if worker.state == State.DRAINING:
                self._end(number)
                log("worker_ended", worker=number)
            else:
                self._finish_start(number, worker)
        if any(worker.state != State.RUNNING for worker in self._workers.values()):
            return  # one thing at a time
        change = self._wanted_change()
        if change is None or change.start == (change.number in self._workers):
            return
        if change.start:
            self._add(change.number)
        else:
            worker = self._workers[change.number]
            worker.state, worker.answer = State.DRAINING, worker.actor.ask("drain", self._grace)

    def _finish_start(self, number: int, worker: _Worker) -> None:
        try:
            _result(worker.answer)
            worker.state = State.RUNNING
            log("worker_added", worker=number)
        except IsthmusError as error:
            log("worker_not_added", logging.ERROR, worker=number, error=str(error))
            self._end(number)
        except ActorError:  # it died while it loaded, and Ray starts it again
            worker.answer = worker.actor.ask("port")

    def _wanted_change(self) -> Change | None:
        if self._controller is None:
            return None
        try:
            change: Change | None = self._controller.ask("change").result(ANSWER_SECONDS)
        except ActorError:
            return None  # the controller is being restarted
        return change

    def _add(self, number: int) -> None:
        if self._specs[number].device == CUDA:
            try:
                self._cluster.reserve_gpus([number], ANSWER_SECONDS)
            except ConfigError as error:
                log("worker_not_added", logging.ERROR, worker=number, error=str(error))
                return
        self._start(number)

    def drain(self, grace: float) -> bool:
        """Finish the calls in flight, for at most `grace` seconds; True if all were answered.

        The stages of a pipeline end one after the other: the first one's calls need those behind it. Workers that are
        still starting have no calls.
        """
        running = [
            number
            for number, worker in self._workers.items()
            if worker.state != State.STARTING or worker.answer.is_ready()
        ]
        inner = [number for number in running if self._specs[number].edges]
        turns = [[number for number in running if number not in inner], *([number] for number in inner)]
        finished = [self._drained(turn, grace) for turn in turns]  # the last one too, whatever the first one says
        return all(finished)

    def _drained(self, numbers: Sequence[int], grace: float) -> bool:
        answers = [self._workers[number].actor.ask("drain", grace) for number in numbers]
        deadline = time.monotonic() + grace + ANSWER_SECONDS
        finished = True
        for answer in answers:
            try:
                finished = bool(answer.result(max(0.0, deadline - time.monotonic()))) and finished
            except MethodError as error:
                raise error.cause from None
            except ActorError:
                finished = False  # the worker is dead, being restarted or stuck, and its calls with it
        return finished

    def is_dead(self) -> bool:
        """Whether a running worker is dead for good. One that Ray restarts, or that is busy, is not."""
        running = (worker for worker in self._workers.values() if worker.state == State.RUNNING)
        questions = [worker.actor.ask("port") for worker in running]
        deadline = time.monotonic() + ANSWER_SECONDS
        for question in questions:
            try:
                question.result(max(0.0, deadline - time.monotonic()))
            except ActorGoneError:
                return True
            except ActorError:
                pass
        return False

    def close(self) -> None:
        """End the actors, and Ray where it was started here."""
        if self._controller is not None:
            self._controller.kill()
        for worker in self._workers.values():
            worker.actor.kill()
        self._cluster.shutdown()

    def _start(self, number: int) -> None:
        spec = self._specs[number]
        environment = {**WORKER_ENVIRONMENT, "OMP_NUM_THREADS": str(spec.threads)}
        if spec.wipe_freed:
            environment |= wiping(os.environ)
        actor = self._cluster.start(Worker, spec, name=self._names[number], environment=environment, worker=number)
        self._workers[number] = _Worker(actor, State.STARTING, actor.ask("port"))

    def _end(self, number: int) -> None:
        self._workers.pop(number).actor.kill()
        self._cluster.release_gpu(number)


def _result(answer: Answer) -> Any:
    """The result of a method; raises what the method raised, and IsthmusError where its actor could not start."""
    try:
        return answer.result()
    except MethodError as error:
        raise error.cause from None
    except ActorGoneError as error:
        # A worker's known faults are raised by `port`; this is anything else, such as too little GPU memory.
        raise IsthmusError(
            f"the worker could not start: {error} (free memory if there was too little of it, and serve again; if it "
            "was not that, report it)"
        ) from None


def _split(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    return {"0.0.0.0": "127.0.0.1", "[::]": "::1"}.get(host, host.strip("[]")), int(port)  # noqa: S104 - compared only


def is_open(address: tuple[str, int]) -> bool:
    """Whether somebody listens at an address."""
    try:
        socket.create_connection(address, CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
