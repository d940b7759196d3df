"""What is asked of Ray: how a cluster is joined, which nodes there are, and where actors and tasks are placed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from isthmus.cloud.cluster.cluster_spec import RESOURCE, Claims
from isthmus.cloud.cluster.joined_cluster import JoinedCluster, Node, start_anywhere, start_here
from isthmus.cloud.control.ray_cluster import NAMESPACE
from isthmus.common.errors import UnreachableError


@dataclass(frozen=True)
class Affinity:
    """Ray's strategy of the same purpose."""

    node_id: str
    soft: bool


class FakeRay(ModuleType):
    """Ray's module, which notes what it is asked for."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.joined: list[dict[str, Any]] = []
        self.refuses: Exception | None = None
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
        return self.known

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(gcs_address="[fd00::1]:6379", get_node_id=lambda: "here")

    def remote(self, **options: Any) -> Any:
        self.options.append(options)
        return lambda kind: SimpleNamespace(options=self._named, remote=self._made, kind=kind)

    def _named(self, **names: Any) -> Any:
        self.names.append(names)
        return SimpleNamespace(remote=self._made)

    def _made(self, *arguments: object) -> str:
        self.given.append(arguments)
        return "handle"


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake, util, strategies = FakeRay(), ModuleType("ray.util"), ModuleType("ray.util.scheduling_strategies")
    strategies.NodeAffinitySchedulingStrategy = Affinity  # type: ignore[attr-defined]
    for module in (fake, util, strategies):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return fake


def test_a_cluster_is_joined_and_left_and_never_started(ray: FakeRay) -> None:
    cluster = JoinedCluster("10.0.0.1:6379")
    (options,) = ray.joined
    assert (options["address"], options["namespace"]) == ("10.0.0.1:6379", NAMESPACE)
    assert cluster.control_store == ("fd00::1", 6379)
    cluster.leave()
    assert ray.is_down == 1


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
