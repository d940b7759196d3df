"""A cloud's actors, and the Ray that they run in.

Ray is a trust domain of its own. The one that is started here is told to listen on the loopback alone and keeps its
sockets in a folder that only this user can enter. Token authentication is always on, with a token that only this user
can read, and `serve` prints the ports that listen (`isthmus.cloud.control.ports`).
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isthmus.cloud.control.autoscaler import Change
from isthmus.cloud.control.controller import Controller, ControllerSpec
from isthmus.cloud.control.gpus import Gpus, no_gpu
from isthmus.cloud.control.worker import CUDA, Worker, WorkerSpec
from isthmus.cloud.telemetry.logs import log, log_file, log_to
from isthmus.common.errors import ConfigError, IsthmusError, UnreachableError
from isthmus.common.files import write_atomic
from isthmus.protocol.secure.keyfiles import read_private

NAMESPACE = "isthmus"
ANSWER_SECONDS = 10.0
CONNECT_SECONDS = 1.0
SILENT_LOOKS, SILENT_LOOKS_AT_OTHERS = 3, 15  # another's cluster may come back, and is not ours to start
LEAVE_SECONDS, LEAVE_PAUSE = 30.0, 0.2

# glibc gives memory back to the kernel and takes it again at every large message unless it is told not to (20 times
# slower). It gives each thread an arena of its own, and what one thread makes and another frees would lie idle in each.
# MKL keeps buffers of its products, of each thread and shape, for good; a product's bits are the same without. Idle
# OpenMP threads of one process spin on the cores that the other needs.
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


class Serving:
    """Running workers, their controller, and the Ray that they run in.

    Args:
        specs: what each worker serves, by number; their `listen` have fixed ports.
        address: address of an existing Ray cluster, or None to start Ray on this machine.
        home: the cloud's folder.
        ray_folder: where a Ray that is started here keeps sockets, logs and what it spills; None with an `address`.
        least: how many of the workers are started at once; the others when they are needed.
        metrics: where the controller serves `/status` and `/metrics`; "" for nowhere.
        grace: seconds that calls in flight get when a worker is ended because it is not needed.
    """

    def __init__(
        self,
        specs: Sequence[WorkerSpec],
        address: str | None,
        home: Path,
        ray_folder: Path | None,
        *,
        least: int,
        metrics: str,
        grace: float,
    ) -> None:
        if address is None:  # an existing cluster has its own rules, and its owner has set this environment for them
            os.environ.update(_ray_environment(home))
        import ray

        self._ray = ray
        self._specs, self._address, self._grace = specs, address, grace
        self._least, self._metrics, self._home, self._ray_folder = least, metrics, home, ray_folder
        log_to(log_file(home, "serve"))
        self._begin()

    def _begin(self) -> None:
        """Start or join Ray, and start the actors."""
        self._starting: dict[int, Any] = {}  # workers that were started later, and the answer that says that they run
        self._ending: dict[int, Any] = {}  # those that drain, and their answer
        self._workers: dict[int, Any] = {}
        self._controllers: list[Any] = []  # the one, once it is started
        self._silent = 0  # looks in a row at which the control store did not answer
        # "local" is a Ray of its own; without it, Ray would join whichever one somebody else runs on this machine. Our
        # actors ask for no CPU, and for each one that Ray counts it would start a process that waits for tasks.
        alone = {"address": "local", "include_dashboard": False, "num_cpus": 0, "_temp_dir": str(self._ray_folder)}
        options = {"address": self._address} if self._address else alone
        try:
            self._ray.init(namespace=NAMESPACE, log_to_driver=True, configure_logging=False, **options)
        except ConnectionError as error:
            raise UnreachableError(
                f"no Ray cluster answers at {self._address}: check --address and the cluster ({error})"
            ) from None
        host, _, port = self._ray.get_runtime_context().gcs_address.rpartition(":")
        self._control = (host.strip("[]"), int(port))
        prefix = f"cloud-{secrets.token_hex(8)}"  # others may serve in the same cluster
        self._names = [f"{prefix}-worker-{spec.number}" for spec in self._specs]
        self._gpus = Gpus()
        on_gpus = [number for number in range(self._least) if self._specs[number].device == CUDA]
        if on_gpus:
            if self._address is None and not self._ray.cluster_resources().get("GPU"):
                raise no_gpu(CUDA)
            self._gpus.reserve(on_gpus)
        self._workers = {number: self._start(number) for number in range(self._least)}
        for worker in self._workers.values():
            self._get(worker.port.remote())
        told = ControllerSpec(
            tuple(self._names), NAMESPACE, self._least, self._metrics, str(log_file(self._home, "controller"))
        )
        controller = self._actor(Controller, f"{prefix}-controller", {"OMP_NUM_THREADS": "1"}).remote(told)
        self._controllers = [controller]
        self._get(controller.ready.remote())

    def tend(self) -> None:
        """Look after the cluster and the number of workers; to be called every second or two.

        Raises:
            ControlStoreLostError: Ray's control store is gone. Without it Ray ends all its processes within a minute.
        """
        self._silent = 0 if _answers(self._control) else self._silent + 1
        if self._silent >= (SILENT_LOOKS if self._address is None else SILENT_LOOKS_AT_OTHERS):
            raise ControlStoreLostError
        if self._least < len(self._specs):
            self._scale()

    def restart(self) -> None:
        """Start the cluster again after its control store was lost.

        Raises:
            UnreachableError: it is not ours to start.
        """
        log("control_store_lost", logging.ERROR)
        if self._address is not None:
            raise UnreachableError(
                f"the control store of the Ray cluster at {self._address} is gone: start the cluster again, and then "
                "`isthmus cloud serve`"
            )
        self._workers, self._controllers = {}, []
        self._ray.shutdown()  # and not `close`, which would speak with the control store
        deadline = time.monotonic() + LEAVE_SECONDS  # the workers' processes end when they notice that Ray has
        listening = [spec.listen for spec in self._specs] + ([self._metrics] if self._metrics else [])
        while any(_answers(_split(listen)) for listen in listening) and time.monotonic() < deadline:
            time.sleep(LEAVE_PAUSE)
        self._begin()
        log("cluster_started_again")

    def budgets(self) -> list[str]:
        """A line on the memory that each worker's forward states and calls may take."""
        asked = [worker.budgets.remote() for _, worker in sorted(self._workers.items())]
        return [self._get(line) for line in asked]

    def _scale(self) -> None:
        """Start or drain a worker where the controller says so, and go on with what was begun. Returns soon."""
        for number, started in list(self._starting.items()):
            if not self._ray.wait([started], timeout=0)[0]:
                continue
            del self._starting[number]
            try:
                self._get(started)
                log("worker_added", worker=number)
            except self._ray.exceptions.RayActorError:  # it died while it loaded, and Ray starts it again
                self._starting[number] = self._workers[number].port.remote()
            except IsthmusError as error:
                log("worker_not_added", logging.ERROR, worker=number, error=str(error))
                self._end(number)
        for number, drained in list(self._ending.items()):
            if self._ray.wait([drained], timeout=0)[0]:
                del self._ending[number]
                self._end(number)
                log("worker_ended", worker=number)
        if self._starting or self._ending:
            return  # one thing at a time
        try:
            change: Change | None = self._ray.get(self._controllers[0].change.remote(), timeout=ANSWER_SECONDS)
        except (self._ray.exceptions.RayError, TimeoutError):
            return  # the controller is being restarted
        if change is None:
            return
        if change.start and change.number not in self._workers:
            self._add(change.number)
        elif not change.start and change.number in self._workers:
            self._ending[change.number] = self._workers[change.number].drain.remote(self._grace)

    def _add(self, number: int) -> None:
        if self._specs[number].device == CUDA:
            try:
                self._gpus.reserve([number], seconds=ANSWER_SECONDS)
            except ConfigError as error:
                log("worker_not_added", logging.ERROR, worker=number, error=str(error))
                return
        self._workers[number] = self._start(number)
        self._starting[number] = self._workers[number].port.remote()

    def drain(self, grace: float) -> bool:
        """Finish the calls in flight, for at most `grace` seconds; True if all were answered.

        The stages of a pipeline end one after the other: the first one's calls need those behind it. Workers that are
        still starting have no calls.
        """
        loading = [number for number, started in self._starting.items() if not self._ray.wait([started], timeout=0)[0]]
        running = [number for number in self._workers if number not in loading]
        inner = [number for number in running if self._specs[number].edges]
        turns = [[number for number in running if number not in inner], *([number] for number in inner)]
        finished = [self._drained(turn, grace) for turn in turns]  # the last one too, whatever the first one says
        return all(finished)

    def _drained(self, numbers: Sequence[int], grace: float) -> bool:
        answers = [self._workers[number].drain.remote(grace) for number in numbers]
        deadline = time.monotonic() + grace + ANSWER_SECONDS
        finished = True
        for answer in answers:
            try:
                finished = bool(self._ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))) and finished
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except (self._ray.exceptions.RayActorError, TimeoutError):
                finished = False  # the worker is dead, being restarted or stuck, and its calls with it
        return finished

    def is_dead(self) -> bool:
        """Whether a worker is dead now. One that Ray restarts or that is busy is not, or not for long.

        Those that were started later are asked by `tend` until they run, those that end not any more.
        """
        others = {*self._starting, *self._ending}
        questions = [worker.port.remote() for number, worker in self._workers.items() if number not in others]
        deadline = time.monotonic() + ANSWER_SECONDS
        for question in questions:
            try:
                self._ray.get(question, timeout=max(0.0, deadline - time.monotonic()))
            except self._ray.exceptions.ActorDiedError:
                return True
            except (self._ray.exceptions.RayError, TimeoutError):
                pass
        return False

    def close(self) -> None:
        """End the actors, and Ray where it was started here."""
        for actor in (*self._controllers, *self._workers.values()):
            self._ray.kill(actor)
        self._ray.shutdown()

    def _start(self, number: int) -> Any:
        spec = self._specs[number]
        environment = {**WORKER_ENVIRONMENT, "OMP_NUM_THREADS": str(spec.threads)}
        return self._actor(Worker, self._names[number], environment, **self._gpus.options(number)).remote(spec)

    def _end(self, number: int) -> None:
        self._ray.kill(self._workers.pop(number))
        self._gpus.give_back(number)

    def _actor(self, kind: type, name: str, environment: dict[str, str], **options: Any) -> Any:
        """An actor class that stays on this node: its files and its port are this node's."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(self._ray.get_runtime_context().get_node_id(), soft=False)
        return self._ray.remote(
            max_restarts=-1,
            max_concurrency=4,
            num_cpus=0,
            runtime_env={"env_vars": environment},
            **{"scheduling_strategy": here, **options},
        )(kind).options(name=name)

    def _get(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.ActorDiedError as error:
            # What a worker knows to be wrong it tells by `port`; this is anything else, such as too little GPU memory.
            raise IsthmusError(
                f"the worker could not start: {str(error).strip().splitlines()[-1]} (free memory if there was too "
                "little of it, and serve again; if it was not that, report it)"
            ) from None


def _split(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    return {"0.0.0.0": "127.0.0.1", "[::]": "::1"}.get(host, host.strip("[]")), int(port)  # noqa: S104 - compared only


def _answers(address: tuple[str, int]) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection(address, CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _ray_environment(home: Path) -> dict[str, str]:
    """Token authentication, the loopback, no usage reports, and workers as urgent as `serve` itself.

    Ray listens on every interface, whatever address it is given, unless it is told that its cluster has one machine, as
    it believes by itself on macOS and Windows: hence the variable's name. By default it makes its workers nice (15), so
    that others come first; here they are what others wait for.

    Raises:
        KeyFileError: the token in the home is readable by others.
    """
    settings = {
        "RAY_AUTH_MODE": "token",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    if "RAY_AUTH_TOKEN_PATH" in os.environ:  # a cluster's own token, given by whoever started it
        return settings
    token = home / "ray_token"
    if not token.exists():
        write_atomic(token, secrets.token_hex(32).encode(), 0o600)
    read_private(token, "remove it, and `isthmus cloud serve` makes another")
    return {**settings, "RAY_AUTH_TOKEN_PATH": str(token.absolute())}
