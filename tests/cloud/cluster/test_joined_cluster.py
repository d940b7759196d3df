"""What is asked of Ray: how a cluster is joined, which nodes there are, and where actors and tasks are placed."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from ray import exceptions

from isthmus.cloud.cluster import joined_cluster
from isthmus.cloud.cluster.cluster_spec import RESOURCE, Claims
from isthmus.cloud.cluster.joined_cluster import JoinedCluster, Node, named_actors, start_anywhere, start_here
from isthmus.cloud.control.ray_cluster import NAMESPACE, find_actor
from isthmus.common.errors import UnreachableError
from isthmus.experiments.rigs.secrets.memory_scan import stopped


@dataclass(frozen=True)
class Affinity:
    """Ray's strategy of the same purpose."""

    node_id: str
    soft: bool


class Store:
    """Ray's client of its control store; each question has to say for how long it waits."""

    def __init__(self, ray: FakeRay) -> None:
        self._ray = ray
        self.values: dict[tuple[bytes, bytes], bytes] = {}
        self.known: dict[str, Any] = {}

    def get_all_node_info(self, *, timeout: float) -> dict[str, Any]:
        self._answer(timeout)
        return self.known

    def internal_kv_put(self, key: bytes, value: bytes, overwrite: bool, namespace: bytes, *, timeout: float) -> int:
        self._answer(timeout)
        assert overwrite
        self.values[namespace, key] = value
        return 1

    def internal_kv_get(self, key: bytes, namespace: bytes, *, timeout: float) -> bytes | None:
        self._answer(timeout)
        return self.values.get((namespace, key))

    def _answer(self, timeout: float) -> None:
        assert 0 < timeout < 30
        self._ray.answer()


class FakeRay(ModuleType):
    """Ray's module, which notes what it is asked for."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.exceptions = exceptions
        self.util = SimpleNamespace(list_named_actors=self._named_actors)
        self.joined: list[dict[str, Any]] = []
        self.refuses: Exception | None = None
        self.fails: Exception | None = None  # with which the control store answers whatever it is asked
        self.store = Store(self)
        self.is_down = 0
        self.known: list[dict[str, Any]] = []
        self.options: list[dict[str, Any]] = []
        self.names: list[dict[str, Any]] = []
        self.given: list[tuple[object, ...]] = []

    def init(self, **options: Any) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.joined.append(options)

    def shutdown(self) -> None:
        self.is_down += 1

    def nodes(self) -> list[dict[str, Any]]:
        self.answer()
        return self.known

    def answer(self) -> None:
        if self.fails is not None:
            raise self.fails

    def get_actor(self, name: str, namespace: str) -> str:
        self.answer()
        raise ValueError("Failed to look up actor")

    def _named_actors(self) -> list[str]:
        self.answer()
        return []

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(gcs_address="[fd00::1]:6379", get_node_id=lambda: "here")

    def remote(self, **options: Any) -> Any:
        self.options.append(options)
        return lambda kind: SimpleNamespace(options=self._named, remote=self._made, kind=kind)

    def _named(self, **names: Any) -> Any:
        self.names.append(names)
        return SimpleNamespace(remote=self._made)

    def _made(self, *arguments: object) -> str:
        self.answer()
        self.given.append(arguments)
        return "handle"


@pytest.fixture(name="ray")
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake, util, strategies = FakeRay(), ModuleType("ray.util"), ModuleType("ray.util.scheduling_strategies")
    experimental, kept = ModuleType("ray.experimental"), ModuleType("ray.experimental.internal_kv")
    strategies.NodeAffinitySchedulingStrategy = Affinity  # type: ignore[attr-defined]
    kept.internal_kv_get_gcs_client = lambda: fake.store  # type: ignore[attr-defined]
    for module in (fake, util, strategies, experimental, kept):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return fake


def test_a_cluster_is_joined_and_left_and_never_started(ray: FakeRay) -> None:
    cluster = JoinedCluster("10.0.0.1:6379")
    (options,) = ray.joined
    assert (options["address"], options["namespace"]) == ("10.0.0.1:6379", NAMESPACE)
    assert cluster.control_store == ("fd00::1", 6379)
    cluster.leave()
    assert ray.is_down == 1


# Errors of Ray's own --------------------------------------------------------------------------------------------------


def test_a_token_that_is_not_here_gets_one_line_with_the_remedy(ray: FakeRay) -> None:
    missing = "Token authentication is enabled but no authentication token was found"
    ray.refuses = exceptions.AuthenticationError(missing)
    with pytest.raises(UnreachableError) as refused:
        JoinedCluster("auto")
    text = str(refused.value)
    assert missing in text
    assert "name the file that has it in RAY_AUTH_TOKEN_PATH, or put it into ~/.ray/auth_token" in text
    assert "\n" not in text
    assert "docs.ray.io" not in text


@pytest.mark.parametrize(
    "ask",
    [
        lambda: JoinedCluster("auto"),
        lambda: JoinedCluster.__new__(JoinedCluster).nodes(),
        lambda: JoinedCluster.__new__(JoinedCluster).addresses(),
        lambda: JoinedCluster.__new__(JoinedCluster).keep("name", b"value"),
        lambda: JoinedCluster.__new__(JoinedCluster).kept("name"),
        lambda: JoinedCluster.__new__(JoinedCluster).run_on(Node("id2", "10.0.0.2", "gpu-2", 1, {}), len),
        lambda: find_actor("controller"),
        lambda: named_actors(str),
        lambda: start_here(dict, "spec", name="controller", environment={}),
        lambda: start_anywhere(dict, "spec", name="worker", environment={}, claims=Claims()),
    ],
    ids=["join", "nodes", "addresses", "keep", "kept", "run", "find", "named", "here", "anywhere"],
)
def test_a_control_store_that_does_not_answer_gets_one_line(ray: FakeRay, ask: Callable[[], object]) -> None:
    late = "There was timeout in getting the actor handle"
    ray.fails = ray.refuses = exceptions.GetTimeoutError(f"{late}\nMore of it.")
    with pytest.raises(UnreachableError) as refused:
        ask()
    text = str(refused.value)
    assert text.startswith(f"Ray does not answer ({late}): ")
    assert "once `ray status` answers" in text
    assert "\n" not in text


def test_an_actor_that_is_not_there_is_none(ray: FakeRay) -> None:
    assert ray.fails is None
    assert find_actor("controller") is None
    assert named_actors(str) == {}


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Could not find any running Ray instance.\nMore of it."),
        RuntimeError("Failed to connect to GCS.\nMore of it."),
        ValueError(""),
    ],
)
def test_a_machine_that_is_no_node_gets_one_line(ray: FakeRay, error: Exception) -> None:
    ray.refuses = error
    with pytest.raises(UnreachableError) as refused:
        JoinedCluster("auto")
    text = str(refused.value)
    assert text.startswith("this machine is no node of a Ray cluster at auto: start one here (`ray start --head`")
    assert (str(error).splitlines() or ["ValueError"])[0] in text
    assert "\n" not in text


def node(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "NodeID": f"id{number}",
        "NodeManagerAddress": f"10.0.0.{number}",
        "NodeManagerHostname": f"gpu-{number}",
        "Alive": True,
        "Resources": {"CPU": 8.0, RESOURCE: float(number)},
        "Labels": {"zone": "a"},
        **changes,
    }


def test_nodes_are_those_that_are_alive(ray: FakeRay) -> None:
    bare = {"NodeID": "id4", "NodeManagerAddress": "10.0.0.4", "NodeManagerHostname": "head", "Alive": True}
    ray.known = [bare, node(2), node(3, Alive=False), node(1)]
    assert JoinedCluster("auto").nodes() == [
        Node("id1", "10.0.0.1", "gpu-1", 1.0, {"zone": "a"}),
        Node("id2", "10.0.0.2", "gpu-2", 2.0, {"zone": "a"}),
        Node("id4", "10.0.0.4", "head", 0.0, {}),
    ]


def test_addresses_are_of_nodes_that_are_alive(ray: FakeRay) -> None:
    states = {"10.0.0.1": 0, "10.0.0.2": 1, "10.0.0.3": 0}
    ray.store.known = {at: SimpleNamespace(node_manager_address=at, state=s, ALIVE=0) for at, s in states.items()}
    assert JoinedCluster("auto").addresses() == {"10.0.0.1", "10.0.0.3"}


def test_a_value_is_kept_under_its_name_until_the_next_one(ray: FakeRay) -> None:
    cluster = JoinedCluster("auto")
    assert cluster.kept("note") is None
    cluster.keep("note", b"1")
    cluster.keep("note", b"2")
    cluster.keep("other", b"3")
    assert cluster.kept("note") == b"2"
    assert set(ray.store.values) == {(b"isthmus", b"note"), (b"isthmus", b"other")}


def test_a_task_runs_on_its_node_and_nowhere_else(ray: FakeRay) -> None:
    JoinedCluster("auto").run_on(Node("id2", "10.0.0.2", "gpu-2", 1, {}), len, "model")
    (options,) = ray.options
    assert options["scheduling_strategy"] == Affinity("id2", soft=False)
    assert (options["num_cpus"], options["max_retries"]) == (0, 0)
    assert ray.given == [("model",)]


def test_the_controller_stays_on_this_node_and_outlives_this_process(ray: FakeRay) -> None:
    start_here(dict, "spec", name="controller", environment={"OMP_NUM_THREADS": "1"})
    (options,), (names,) = ray.options, ray.names
    assert options["scheduling_strategy"] == Affinity("here", soft=False)
    assert (options["max_restarts"], options["num_cpus"]) == (-1, 0)
    assert options["runtime_env"] == {"env_vars": {"OMP_NUM_THREADS": "1"}}
    assert names == {"name": "controller", "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    assert ray.given == [("spec",)]


A, B = {"zone": "a"}, {"zone": "b"}


@pytest.mark.parametrize(
    ("claims", "placed"),
    [
        (Claims(), {"scheduling_strategy": "SPREAD"}),
        (Claims(1 << 30, 1), {"scheduling_strategy": "SPREAD", "memory": 1 << 30, "num_gpus": 1}),
        (Claims(labels=(A,)), {"label_selector": A}),
        (Claims(labels=(A, B)), {"label_selector": A, "fallback_strategy": [{"label_selector": B}]}),
    ],
)
def test_a_worker_claims_what_it_needs_of_any_node(ray: FakeRay, claims: Claims, placed: dict[str, Any]) -> None:
    start_anywhere(dict, "spec", name="worker", environment={}, claims=claims)
    (options,) = ray.options
    fixed = {"max_restarts", "max_concurrency", "num_cpus", "runtime_env"}
    assert {name: value for name, value in options.items() if name not in fixed} == {
        "resources": {RESOURCE: 1},
        **placed,
    }
    assert ray.names[0]["get_if_exists"]


# A Ray that runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def running() -> Iterator[None]:
    """A cluster of this machine alone: what is asked of its control store itself is no part of Ray's documented API."""
    import ray

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    ray.init(address="local", num_cpus=0, include_dashboard=False, configure_logging=False, log_to_driver=False)
    yield
    ray.shutdown()
    for number, handler in handlers.items():  # Ray has put its own in their place
        signal.signal(number, handler)


@pytest.mark.usefixtures("running")
def test_the_control_store_of_the_ray_that_is_installed_keeps_values_and_knows_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    monkeypatch.setattr(ray, "init", lambda **_: None)  # it is joined already
    cluster = JoinedCluster("auto")
    assert cluster.addresses() == {node.address for node in cluster.nodes()} != set()
    assert cluster.kept("note") is None
    cluster.keep("note", b"1")
    cluster.keep("note", b"2")
    assert cluster.kept("note") == b"2"
    store = ray._private.worker._global_node.all_processes["gcs_server"][0].process.pid
    monkeypatch.setattr(joined_cluster, "STORE_SECONDS", 0.2)
    with stopped(store):
        for ask in (cluster.addresses, lambda: cluster.kept("note"), lambda: cluster.keep("note", b"3")):
            with pytest.raises(UnreachableError, match="Ray does not answer"):
                ask()
    assert cluster.kept("note") in (b"2", b"3")
