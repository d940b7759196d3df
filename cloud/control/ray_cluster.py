"""All that isthmus asks of Ray: a cluster, actors in it, answers of their methods, and GPUs. No other module calls Ray.

Ray is a trust domain of its own. A cluster that is started here listens on the loopback alone, and keeps its sockets in
a folder that only this user can enter. Token authentication is always on, with a token that only this user can read,
and `serve` prints the ports that listen (`isthmus.cloud.control.ports`).
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from isthmus.common.errors import ConfigError, UnreachableError
from isthmus.common.files import write_atomic
from isthmus.protocol.secure.keyfiles import read_private

NAMESPACE = "isthmus"
GPU_SECONDS = 20.0
"""How long Ray may take to reserve GPUs: it needs a second, and another node that joins reports its GPUs late."""
_THIS_NODE = 0.001
"""Of the resource that each node has one of, and that is named after it: it keeps a reservation on this node."""


class ActorError(Exception):
    """A method of an actor has given no result. Never shown to anybody."""


class ActorGoneError(ActorError):
    """The actor is dead, and Ray does not start it again."""


class NoAnswerError(ActorError):
    """The actor does not answer now: it is being restarted, busy, or unreachable."""


class MethodError(ActorError):
    """The method raised `cause`."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(type(cause).__name__)
        self.cause = cause


class Answer:
    """The answer of an actor's method, which may be yet to come."""

    def __init__(self, reference: Any) -> None:
        self._reference = reference

    def is_ready(self) -> bool:
        """Whether the result, or the error, is there."""
        import ray

        return bool(ray.wait([self._reference], timeout=0)[0])

    def result(self, seconds: float | None = None) -> Any:
        """Wait for the result, for at most so many seconds; None waits for as long as it takes.

        Raises:
            MethodError: the method raised an error.
            ActorGoneError: the actor is dead.
            NoAnswerError: there is no answer within that time, or the actor is being restarted.
        """
        import ray

        try:
            return ray.get(self._reference, timeout=seconds)
        except ray.exceptions.RayTaskError as error:
            raise MethodError(error.cause) from None
        except ray.exceptions.ActorDiedError as error:
            raise ActorGoneError(str(error).strip().splitlines()[-1]) from None
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise NoAnswerError(type(error).__name__) from None


class Actor:
    """A handle of an actor."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def ask(self, method: str, *arguments: object) -> Answer:
        """Call a method; returns at once."""
        return Answer(getattr(self._handle, method).remote(*arguments))

    def kill(self) -> None:
        """End its process; Ray does not start it again."""
        import ray

        ray.kill(self._handle)


def wait_for(answers: Iterable[Answer], seconds: float) -> None:
    """Wait until all answers are ready, for at most so many seconds."""
    import ray

    references = [answer._reference for answer in answers]
    if references:
        ray.wait(references, num_returns=len(references), timeout=seconds)


@contextmanager
def ray_errors() -> Iterator[None]:
    """Turn errors of Ray's own into `UnreachableError`: its control store is silent, say, or wants a token."""
    import ray

    try:
        yield
    except ray.exceptions.AuthenticationError as error:
        raise UnreachableError(
            f"Ray wants the cluster's token and has none from here ({error.message}): name the file that has it in "
            "RAY_AUTH_TOKEN_PATH, or put it into ~/.ray/auth_token"
        ) from None
    except ray.exceptions.RayError as error:
        raise UnreachableError(
            f"Ray does not answer ({first_line(error)}): its head is away, busy or starting; run the command again "
            "once `ray status` answers"
        ) from None


def first_line(error: BaseException) -> str:
    """What an error says, without the lines that Ray adds; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def find_actor(name: str) -> Actor | None:
    """The actor of a name in this process's cluster; None where there is none at present.

    Raises:
        UnreachableError: the control store does not answer.
    """
    import ray

    with ray_errors():
        try:
            return Actor(ray.get_actor(name, namespace=NAMESPACE))
        except ValueError:
            return None


def node_address() -> str:
    """This node's IP address in the cluster."""
    import ray

    return str(ray.util.get_node_ip_address())


def was_restarted() -> bool:
    """Whether this process takes the place of an actor that died."""
    import ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Ray itself calls there what it has deprecated
        return ray.is_initialized() and bool(ray.get_runtime_context().was_current_actor_reconstructed)


class RayCluster:
    """The cluster of this machine alone, which this process starts.

    Args:
        home: the cloud's folder, where the cluster's token is kept.
        folder: where it keeps sockets, logs and what it spills.

    Attributes:
        control_store: host and port of its control store.

    Raises:
        KeyFileError: the token in the home is readable by others.
    """

    def __init__(self, home: Path, folder: Path) -> None:
        os.environ.update(ray_environment(home))
        import ray

        # "local" is a cluster of its own; without it, Ray would join whichever one somebody else runs on this machine.
        # Our actors ask for no CPU, and for each CPU that Ray counts it would start a process that waits for tasks.
        own = {"address": "local", "include_dashboard": False, "num_cpus": 0, "_temp_dir": str(folder)}
        ray.init(namespace=NAMESPACE, log_to_driver=True, configure_logging=False, **own)
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        self.control_store = (host.strip("[]"), int(port))
        self._gpus = Gpus()

    @property
    def has_gpus(self) -> bool:
        """Whether the cluster has any GPU."""
        import ray

        return bool(ray.cluster_resources().get("GPU"))

    def reserve_gpus(self, workers: Sequence[int], seconds: float = GPU_SECONDS) -> None:
        """Reserve a GPU for each of these workers, by number, all or none. Raises ConfigError."""
        self._gpus.reserve(workers, seconds=seconds)

    def release_gpu(self, worker: int) -> None:
        """Release a worker's GPU, if it has one."""
        self._gpus.release(worker)

    def start(
        self, kind: type, argument: object, *, name: str, environment: Mapping[str, str], worker: int | None = None
    ) -> Actor:
        """Start an actor, which Ray restarts whenever its process dies.

        Args:
            kind: its class.
            argument: what the class is made with.
            name: its name in the cluster.
            environment: variables of its process.
            worker: the number of the worker that it is, whose GPU it gets.
        """
        import ray

        gpu = {} if worker is None else self._gpus.options(worker)
        made = ray.remote(
            max_restarts=-1, max_concurrency=4, num_cpus=0, runtime_env={"env_vars": dict(environment)}, **gpu
        )(kind)
        return Actor(made.options(name=name).remote(argument))

    def shutdown(self) -> None:
        """End the cluster."""
        import ray

        ray.shutdown()


class Gpus:
    """Reserves GPUs of this node: one for each worker that computes on one.

    A group of several workers gets all of its GPUs or none (a placement group of Ray's), so that a pipeline never waits
    half started for GPUs that another cloud holds. A worker that is restarted comes back to its own GPU.
    """

    def __init__(self) -> None:
        self._groups: dict[int, Any] = {}  # worker -> its group
        self._bundles: dict[int, int] = {}  # worker -> its place in the group

    def reserve(self, workers: Sequence[int], *, seconds: float = GPU_SECONDS) -> None:
        """Reserve one for each of these workers, by number.

        Raises:
            ConfigError: the node has not so many that are free, after so many seconds.
        """
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group

        node = f"node:{ray.util.get_node_ip_address()}"
        group = placement_group([{"GPU": 1, node: _THIS_NODE}] * len(workers), strategy="STRICT_PACK")
        if not group.wait(seconds):
            remove_placement_group(group)
            free = ray.available_resources().get("GPU", 0)
            raise ConfigError(
                f"{len(workers)} workers on GPUs need one each, and Ray has {free:g} to give on this node: give fewer "
                "--workers or --pipeline stages, or --device cpu"
            )
        for bundle, worker in enumerate(workers):
            self._groups[worker], self._bundles[worker] = group, bundle

    def options(self, worker: int) -> dict[str, Any]:
        """Ray's options for the worker's actor; empty where it has no GPU."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        if worker not in self._groups:
            return {}
        place = PlacementGroupSchedulingStrategy(
            self._groups[worker], placement_group_bundle_index=self._bundles[worker]
        )
        return {"num_gpus": 1, "scheduling_strategy": place}

    def release(self, worker: int) -> None:
        """Note that a worker has ended. A group's GPUs are free again once all of its workers have ended."""
        from ray.util.placement_group import remove_placement_group

        group = self._groups.pop(worker, None)
        self._bundles.pop(worker, None)
        if group is not None and group not in self._groups.values():
            remove_placement_group(group)


def ray_environment(home: Path) -> dict[str, str]:
    """Token authentication, the loopback alone, no usage reports, and workers as urgent as `serve` itself.

    Ray listens on every interface, whatever address it is given, unless it is told that its cluster has one machine, as
    it believes by itself on macOS and Windows: hence the variable's name. By default it gives its workers a low
    priority (nice 15); here they are what others wait for.

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
