"""A Ray cluster that exists, as this process has joined it: its nodes, detached actors, tasks on a node, what it keeps.

Nothing secret passes through Ray. What actors are made with, and variables of their processes, lie in the control store
and in logs; arguments and results of methods do not, and still have no key and no activation in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from isthmus.cloud.cluster.cluster_spec import RESOURCE, Claims
from isthmus.cloud.control.ray_cluster import NAMESPACE, Actor, Answer, find_actor, first_line, ray_errors
from isthmus.common.errors import UnreachableError
from isthmus.protocol.limits import MAX_WORKERS

STORE_SECONDS = 5.0
"""For the control store to answer, which takes it milliseconds: whoever looks after a cloud must not hang with it."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster that is alive.

    Attributes:
        id: Ray's.
        address: its IP address in the cluster.
        host: its name.
        workers: how many workers it takes (its resource `isthmus`).
        labels: those that it was started with.
    """

    id: str
    address: str
    host: str
    workers: float
    labels: Mapping[str, str]


class JoinedCluster:
    """The cluster at an address, which this process joins.

    Args:
        address: `host:port` of its control store, or "auto" for the one that this machine is a node of.

    Attributes:
        control_store: host and port of its control store.

    Raises:
        UnreachableError: no cluster answers there, this machine is no node of it, or its token is not here.
    """

    def __init__(self, address: str) -> None:
        import ray

        with ray_errors():
            try:
                ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise UnreachableError(
                    f"this machine is no node of a Ray cluster at {address}: start one here (`ray start --head`, or "
                    f"`ray start --address HOST:PORT`), and check --address ({first_line(error)})"
                ) from None
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        self.control_store = (host.strip("[]"), int(port))

    def nodes(self) -> list[Node]:
        """The nodes that are alive, by address. Asks the control store, and waits for it.

        Raises:
            UnreachableError: it does not answer.
        """
        import ray

        with ray_errors():
            known = ray.nodes()
        found = [
            Node(
                each["NodeID"],
                each["NodeManagerAddress"],
                each["NodeManagerHostname"],
                float(each.get("Resources", {}).get(RESOURCE, 0)),
                dict(each.get("Labels", {})),
            )
            for each in known
            if each["Alive"]
        ]
        return sorted(found, key=lambda node: node.address)

    def addresses(self) -> set[str]:
        """The addresses of the nodes that are alive.

        Raises:
            UnreachableError: the control store does not answer within `STORE_SECONDS`; `nodes` waits without an end.
        """
        with ray_errors():
            known = _control_store().get_all_node_info(timeout=STORE_SECONDS)
        return {node.node_manager_address for node in known.values() if node.state == node.ALIVE}

    def keep(self, name: str, value: bytes) -> None:
        """Have the control store keep a value under a name, in the place of an older one. Nothing secret may be in it.

        Raises:
            UnreachableError: it does not answer within `STORE_SECONDS`.
        """
        with ray_errors():
            _control_store().internal_kv_put(
                name.encode(), value, overwrite=True, namespace=NAMESPACE.encode(), timeout=STORE_SECONDS
            )

    def kept(self, name: str) -> bytes | None:
        """What `keep` was given; None where the control store has nothing, or has lost it.

        Raises:
            UnreachableError: it does not answer within `STORE_SECONDS`.
        """
        with ray_errors():
            found: bytes | None = _control_store().internal_kv_get(
                name.encode(), namespace=NAMESPACE.encode(), timeout=STORE_SECONDS
            )
        return found

    def run_on(self, node: Node, task: Callable[..., object], *arguments: object) -> Answer:
        """Run a function on a node. Raises UnreachableError where the control store does not answer."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        with ray_errors():
            return Answer(ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(task).remote(*arguments))

    def leave(self) -> None:
        """Leave the cluster, which goes on."""
        import ray

        ray.shutdown()


def _control_store() -> Any:
    """Ray's client of its control store: only there can a question have an end."""
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    return internal_kv_get_gcs_client()


def named_actors(name_of: Callable[[int], str]) -> dict[int, Actor]:
    """The actors of this cluster that have the name of a number, by number.

    Raises:
        UnreachableError: the control store does not answer.
    """
    import ray

    with ray_errors():
        names = set(ray.util.list_named_actors())
    found = {number: find_actor(name_of(number)) for number in range(MAX_WORKERS) if name_of(number) in names}
    return {number: actor for number, actor in found.items() if actor is not None}


def start_here(kind: type, argument: object, *, name: str, environment: Mapping[str, str]) -> Actor:
    """Start a detached actor on this node, which Ray restarts here whenever its process dies.

    Raises:
        UnreachableError: the control store does not answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return _started(kind, argument, name, environment, {"scheduling_strategy": here})


def start_anywhere(kind: type, argument: object, *, name: str, environment: Mapping[str, str], claims: Claims) -> Actor:
    """Start a detached actor on a node that has what it claims, spread over the nodes; Ray restarts it on any of them.

    Args:
        kind: its class.
        argument: what the class is made with.
        name: its name in the cluster; an actor that has it already is returned.
        environment: variables of its process.
        claims: of the node.

    Raises:
        UnreachableError: the control store does not answer.
    """
    options: dict[str, Any] = {"resources": {RESOURCE: 1}, "scheduling_strategy": "SPREAD"}
    if claims.memory:
        options["memory"] = claims.memory
    if claims.gpus:
        options["num_gpus"] = claims.gpus
    if claims.labels:
        first, *others = claims.labels
        del options["scheduling_strategy"]  # Ray takes labels or a strategy
        options["label_selector"] = first
        if others:
            options["fallback_strategy"] = [{"label_selector": each} for each in others]
    return _started(kind, argument, name, environment, options)


def _started(
    kind: type, argument: object, name: str, environment: Mapping[str, str], options: Mapping[str, Any]
) -> Actor:
    import ray

    made = ray.remote(
        max_restarts=-1,
        max_concurrency=8,
        num_cpus=0,
        runtime_env={"env_vars": dict(environment)},
        **options,
    )(kind)
    named = made.options(name=name, namespace=NAMESPACE, lifetime="detached", get_if_exists=True)
    with ray_errors():
        return Actor(named.remote(argument))
