"""What `isthmus cloud doctor` finds, from facts of the test's own."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from support.cluster.fake_actors import FakeActor
from support.cluster.owners_folder import OwnersFolder
from support.models.tiny import tiny_checkpoint

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.cloud.cluster import cluster_doctor
from isthmus.cloud.cluster.cluster_doctor import MOST_SKEW, Finding, examine, view
from isthmus.cloud.cluster.cluster_spec import ClusterSpec
from isthmus.cloud.cluster.joined_cluster import Node
from isthmus.cloud.cluster.node_probe import PACKAGES, NodeFacts, clock
from isthmus.cloud.control.ray_cluster import MethodError, NoAnswerError
from isthmus.cloud.control.worker import WorkerSpec
from isthmus.cloud.nodes.node_worker import NodeSpec
from isthmus.common.errors import UnknownModelError
from isthmus.protocol.secure.keys import make_issuer

NOW = 1_700_000_000.0
DIGEST = "ab" * 32
HEAD, GPU = Node("id1", "10.0.0.1", "head", 0, {}), Node("id2", "10.0.0.2", "gpu-2", 2, {})


class Clinic:
    """A cluster whose nodes are as the test says.

    Attributes:
        facts: of each node, by its host; an error instead is what asking it raises.
        cloud: the answer of the controller to `state`; None where there is none.
        note: what the control store keeps of the cloud.
    """

    def __init__(self, owner: OwnersFolder, patch: pytest.MonkeyPatch) -> None:
        self.owner, self.patch = owner, patch
        self.alive = [HEAD, GPU]
        key = owner.node_key("gpu-2").public_key().public_bytes_raw()
        versions = {"python": "3.11.7", **dict.fromkeys(PACKAGES, "1.0")}
        self.well = NodeFacts(versions, key, "", True, True, NOW + 90 * 86_400, (), DIGEST)
        bare = dataclasses.replace(self.well, node_key=b"", key_fault="no key", digest="")
        self.facts: dict[str, NodeFacts | Exception] = {"head": bare, "gpu-2": self.well}
        self.cloud: dict[str, Any] | None = None
        self.note: bytes | None = None
        self.is_silent = False
        self.clocks = {"head": NOW, "gpu-2": NOW}
        self.asked: list[tuple[str, ...]] = []
        self.left = 0
        patch.setattr(cluster_doctor, "JoinedCluster", lambda address: self)
        patch.setattr(cluster_doctor, "probe", lambda model: bare)
        patch.setattr(cluster_doctor, "find_actor", self._find)
        patch.setattr(cluster_doctor, "time", SimpleNamespace(time=lambda: NOW, monotonic=time.monotonic))
        patch.setenv("RAY_USE_TLS", "1")
        patch.setenv("RAY_AUTH_MODE", "token")
        make_issuer(owner.folder, 7, lambda: NOW)
        patch.setattr(cluster_doctor, "load_issuer", lambda home: _load_issuer(home, lambda: NOW))

    def nodes(self) -> list[Node]:
        return self.alive

    def run_on(self, node: Node, task: object, *model: str) -> Any:
        if task is clock:
            return SimpleNamespace(result=lambda seconds: self.clocks[node.host])
        self.asked.append((node.host, *model))
        facts = self.facts[node.host]

        def result(seconds: float) -> NodeFacts:
            if isinstance(facts, Exception):
                raise facts
            return facts

        return SimpleNamespace(result=result)

    def kept(self, name: str) -> bytes | None:
        assert name == "isthmus-cloud-note"
        return self.note

    def leave(self) -> None:
        self.left += 1

    def _find(self, name: str) -> FakeActor | None:
        assert name == "isthmus-cloud-controller"
        if self.cloud is None:
            return None
        actor = FakeActor(name, SimpleNamespace(state=lambda: self.cloud))
        actor.is_silent = self.is_silent
        return actor

    def change(self, host: str, **changes: Any) -> None:
        facts = self.facts[host]
        assert isinstance(facts, NodeFacts)
        self.facts[host] = dataclasses.replace(facts, **changes)

    def findings(self, model: str | None = None) -> list[Finding]:
        return examine("auto", "cloud", self.owner.folder, model)

    def wrong(self, model: str | None = None) -> list[str]:
        return [f"{each.about}: {each.text}" for each in self.findings(model) if not each.good]


_load_issuer = cluster_doctor.load_issuer


@pytest.fixture
def clinic(owner: OwnersFolder, monkeypatch: pytest.MonkeyPatch) -> Clinic:
    return Clinic(owner, monkeypatch)


def of_cloud(**changes: Any) -> dict[str, Any]:
    worker = WorkerSpec("/models/tiny", "tiny", "2:2", "fp32", "", "", "node:7443", 1, 1, 1, "")
    spec = ClusterSpec("cloud", "/home", NodeSpec("cloud", bytes(32), worker, DIGEST, "", ""), 1, 1)
    return {"ready": True, "waits": [], "faults": [], "places": ["10.0.0.2:7443"], "spec": spec, **changes}


def test_a_cluster_that_is_well_has_nothing_to_mend(clinic: Clinic) -> None:
    clinic.cloud = of_cloud()
    findings = clinic.findings()
    assert [each.text for each in findings if not each.good] == []
    assert {each.about: each.text for each in findings} == {
        "nodes": "2 nodes; 1 of them take 2 workers",
        "Ray's TLS and token": "on",
        "the issuer": "its certificate expires on 2023-11-21 22:13 UTC",
        "enrolled nodes": "1",
        "the cloud cloud": "serves at 10.0.0.2:7443",
        "node head (10.0.0.1)": "isthmus 1.0",
        "node gpu-2 (10.0.0.2)": "isthmus 1.0; has the model",
    }
    assert clinic.asked == [("head", ""), ("gpu-2", "/models/tiny")]
    assert clinic.left == 1


def test_a_cluster_without_a_cloud_yet_is_no_fault(clinic: Clinic) -> None:
    assert clinic.wrong() == []
    assert ("the cloud cloud", "is not running") in {(each.about, each.text) for each in clinic.findings()}


# The cluster as a whole -----------------------------------------------------------------------------------------------


def test_nodes_that_take_no_workers_are_found(clinic: Clinic) -> None:
    clinic.alive = [HEAD]
    assert [each for each in clinic.wrong() if each.startswith("nodes: 1 nodes, and none takes workers")]


def test_several_nodes_without_tls_are_found_and_one_node_needs_none(clinic: Clinic) -> None:
    clinic.patch.setenv("RAY_USE_TLS", "0")
    (text,) = [each for each in clinic.wrong() if each.startswith("Ray's TLS and token")]
    assert "in the clear" in text
    clinic.alive = [GPU]
    assert clinic.wrong() == []
    said = "the token is on; turn TLS on before another node joins"
    assert said in [each.text for each in clinic.findings()]


def test_one_node_of_a_cloud_that_grows_by_itself_needs_tls(clinic: Clinic) -> None:
    clinic.patch.setenv("RAY_USE_TLS", "0")
    clinic.alive, clinic.note = [GPU], b'{"autoscaled": true}'
    (text,) = clinic.wrong()
    assert text.startswith("Ray's TLS and token: an --autoscaled cluster gets several nodes, and Ray's token crosses")
    clinic.note = b'{"autoscaled": true, "stopped": true}'
    assert clinic.wrong() == []
    clinic.note = b'{"autoscaled": true}'
    clinic.patch.setenv("RAY_USE_TLS", "1")
    assert clinic.wrong() == []
    assert ("Ray's TLS and token", "on") in {(each.about, each.text) for each in clinic.findings()}


def test_an_issuer_that_is_missing_or_expires_soon_is_found(clinic: Clinic) -> None:
    make_issuer(clinic.owner.folder, 0.9, lambda: NOW)
    assert clinic.wrong() == [
        "the issuer: its certificate expires on 2023-11-15 19:49 UTC: renew it with `isthmus cloud issuer`"
    ]
    make_issuer(clinic.owner.folder, 1.1, lambda: NOW)
    assert clinic.wrong() == []
    make_issuer(clinic.owner.folder, 1, lambda: NOW - 2 * 86_400)
    assert "issuer expired" in clinic.wrong()[0]
    (clinic.owner.folder / "issuer_cert").unlink()
    assert "issuer_cert does not exist" in clinic.wrong()[0]


def test_a_list_of_nodes_that_is_empty_or_malformed_is_found(clinic: Clinic) -> None:
    nodes = clinic.owner.folder / "authorized_nodes"
    nodes.write_text("nonsense\n")
    assert len(clinic.wrong()) == 1  # and not once more for each node
    assert "line 1" in clinic.wrong()[0]
    nodes.unlink()
    assert "enrolled nodes: none: run `isthmus cloud enroll-node`" in clinic.wrong()


def test_a_cloud_that_does_not_serve_is_found_with_its_reasons(clinic: Clinic) -> None:
    clinic.cloud = of_cloud(ready=False, waits=["worker 0: its model"])
    assert clinic.wrong() == ["the cloud cloud: worker 0: its model"]
    clinic.cloud = of_cloud(faults=["a fault", "another"], waits=["worker 0: an answer"])
    assert clinic.wrong() == ["the cloud cloud: a fault; another"]
    clinic.is_silent = True
    assert "its controller does not answer" in clinic.wrong()[0]


# Each node ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"versions": {"python": "3.11.7", **dict.fromkeys(PACKAGES, "1.0"), "ray": "2.0"}}, "ray 2.0 there, 1.0 here"),
        ({"versions": {"python": "3.12.1", **dict.fromkeys(PACKAGES, "1.0")}}, "python 3.12.1 there, 3.11.7 here"),
        ({"versions": {"python": "3.11.7", "isthmus": "1.0"}}, "torch None there"),
        ({"tls": False}, "Ray uses no TLS there, and TLS here: set RAY_USE_TLS alike"),
        ({"token": False}, "set RAY_AUTH_MODE alike"),
        ({"tls_until": NOW + 6 * 86_400}, "Ray's TLS certificate there expires on 2023-11-20 22:13 UTC: renew it"),
        ({"node_key": b"", "key_fault": "node_key does not exist"}, "node_key does not exist"),
        ({"node_key": bytes(32)}, "is not enrolled: run `isthmus cloud enroll-node`"),
        ({"digest": "cd" * 32}, "has the digest cdcdcdcdcdcdcdcd, not abababababababab: copy it anew"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_on_a_node_is_found_there(clinic: Clinic, changes: dict[str, Any], said: str) -> None:
    clinic.cloud = of_cloud()
    clinic.change("head", digest=DIGEST)  # so that somebody has the model
    assert clinic.wrong() == []
    clinic.change("gpu-2", **changes)
    wrong = clinic.wrong()
    assert wrong
    assert all(each.startswith("node gpu-2 (10.0.0.2): ") for each in wrong)
    assert any(said in each for each in wrong)
    assert len(wrong) == (3 if "None" in said else 1)


def test_a_node_that_takes_no_workers_needs_no_key_and_no_model(clinic: Clinic) -> None:
    clinic.change("head", node_key=bytes(32), digest="cd" * 32)
    clinic.cloud = of_cloud()
    assert clinic.wrong() == []


@pytest.mark.parametrize(
    ("off", "said"),
    [
        (-MOST_SKEW, []),
        (MOST_SKEW, []),
        (-MOST_SKEW - 1, ["node gpu-2 (10.0.0.2): its clock is off by 6 s: set it by NTP"]),
        (3600.0, ["node gpu-2 (10.0.0.2): its clock is off by 3600 s: set it by NTP"]),
    ],
)
def test_a_clock_that_is_wrong_is_found(clinic: Clinic, off: float, said: list[str]) -> None:
    clinic.clocks["gpu-2"] = NOW + off
    assert clinic.wrong() == said


def test_a_node_that_cannot_answer_is_found_and_the_others_are_looked_at(clinic: Clinic) -> None:
    for error, said in (
        (NoAnswerError("GetTimeoutError"), "it does not answer (GetTimeoutError): check its raylet and its ports"),
        (MethodError(ModuleNotFoundError("isthmus")), "it cannot run Isthmus (ModuleNotFoundError: isthmus): install"),
    ):
        clinic.facts["head"] = error
        assert [each.startswith(f"node head (10.0.0.1): {said}") for each in clinic.wrong()] == [True]
        assert any(each.about == "node gpu-2 (10.0.0.2)" and each.good for each in clinic.findings())


def test_open_ports_are_told_and_are_no_fault(clinic: Clinic) -> None:
    clinic.change("gpu-2", open_ports=("gcs_server 6379", "raylet 20000"))
    assert clinic.wrong() == []
    texts = [each.text for each in clinic.findings()]
    assert (
        "other machines can reach gcs_server 6379, raylet 20000: only the cluster's own should, by a firewall" in texts
    )


# The model ------------------------------------------------------------------------------------------------------------


def test_a_model_that_is_asked_for_is_looked_for_on_the_nodes(clinic: Clinic, tmp_path: Path) -> None:
    model = tiny_checkpoint("llama", tmp_path / "model")
    digest = Checkpoint(model, "tiny").digest()
    clinic.change("gpu-2", digest=digest)
    assert clinic.wrong(str(model)) == []
    assert clinic.asked == [("head", ""), ("gpu-2", str(model))]
    clinic.change("gpu-2", digest="")
    assert clinic.wrong(str(model)) == []
    (finding,) = [each for each in clinic.findings(str(model)) if each.about == "the model"]
    remedy = "they fetch it from the owner's machine, and then from each other"
    assert finding.text == f"no node that takes workers has it at {model}: {remedy}"


def test_a_saved_span_must_be_on_each_node(clinic: Clinic) -> None:
    clinic.cloud = of_cloud()
    spec = clinic.cloud["spec"]
    saved = dataclasses.replace(spec.worker.worker, saved_span="/models/tiny")
    clinic.cloud["spec"] = dataclasses.replace(spec, worker=dataclasses.replace(spec.worker, worker=saved))
    assert clinic.wrong() == []
    clinic.change("gpu-2", digest="")
    (wrong,) = clinic.wrong()
    assert wrong.endswith("it is a saved span, so put it on a path that all of them have at /models/tiny")


def test_a_model_that_is_not_here_ends_the_command_and_leaves_the_cluster(clinic: Clinic, tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError):
        clinic.findings(str(tmp_path / "none"))
    assert clinic.left == 1


# How it is shown ------------------------------------------------------------------------------------------------------


def test_findings_are_shown_with_what_is_to_be_mended(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [Finding("nodes", True, "2 nodes"), Finding("the issuer", False, "renew it [soon]")]
    Console(width=100).print(view(findings))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["ok", "nodes", "2", "nodes"], ["mend", "the", "issuer", "renew", "it", "[soon]"]]
    assert findings[1].as_dict() == {"about": "the issuer", "good": False, "text": "renew it [soon]"}
