"""The Kubernetes manifests: an API server takes them, their parts fit together, nothing is too open."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.kubernetes_manifests import (
    DEPLOY,
    cloud_group,
    containers,
    crd_problems,
    manifests,
    named,
    owner_group,
    problems,
    ray_cluster,
    templates,
    volumes,
)

from isthmus.cloud.cluster.cluster_spec import RESOURCE, parse_labels

FOLDER = DEPLOY / "kubernetes"
BASE, ONE_NODE = FOLDER / "base", FOLDER / "one-node"
README = (DEPLOY / "README.md").read_text()
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on this machine")


@pytest.mark.parametrize("thing", manifests(), ids=lambda thing: f"{thing['kind']}-{thing['metadata']['name']}")
def test_kubernetes_takes_the_object(thing: dict[str, Any]) -> None:
    assert problems(thing) == []


def _rename(where: dict[str, Any], old: str, new: str) -> None:
    where[new] = where.pop(old)


SPOILT: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda c: _rename(c["spec"], "headGroupSpec", "headGroup"), "headGroup"),
    (lambda c: c["spec"].update(suspend="no"), "is not of type 'boolean'"),
    (lambda c: c["spec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}), "is not of type 'string'"),
    (lambda c: c["spec"]["workerGroupSpecs"][0].pop("groupName"), "groupName"),
    (lambda c: c["spec"]["workerGroupSpecs"][1].update(replicas="1"), "is not of type 'integer'"),
    (lambda c: _rename(cloud_group(c)["container"], "readinessProbe", "readyProbe"), "readyProbe"),
    (lambda c: cloud_group(c)["container"]["readinessProbe"]["grpc"].pop("port"), "port"),
    (lambda c: cloud_group(c)["container"]["resources"]["limits"].update(memory="12Gibibytes"), "12Gibibytes"),
    (lambda c: cloud_group(c)["pod"]["volumes"][0]["emptyDir"].update(sizeLimit="4 GiB"), "4 GiB"),
    (lambda c: cloud_group(c)["pod"]["volumes"][0].update(emptydir={}), "emptydir"),
    (lambda c: cloud_group(c)["pod"].update(hostNetwork=True), "hostNetwork"),
    (lambda c: cloud_group(c)["pod"]["initContainers"][0].pop("name"), "'name' is a required property"),
    (lambda c: cloud_group(c)["container"].update(env=None), "None is not of type 'array'"),
    (lambda c: cloud_group(c)["container"].update(volumeMounts=["/tmp"]), "is not of type 'object'"),  # noqa: S108
    (lambda c: cloud_group(c)["pod"]["volumes"].append({"name": "tmp", "emptyDir": {}}), "the same name: ['tmp']"),
    (lambda c: cloud_group(c)["container"]["ports"].append({"containerPort": 7443}), "the same containerPort"),
    (lambda c: cloud_group(c)["container"]["volumeMounts"][1].update(mountPath="/tmp"), "the same mountPath"),  # noqa: S108
]


@pytest.mark.parametrize(("spoil", "complaint"), SPOILT)
def test_a_spoilt_cluster_is_refused(spoil: Callable[[dict[str, Any]], object], complaint: str) -> None:
    cluster = copy.deepcopy(ray_cluster())
    spoil(cluster)
    assert complaint in str(problems(cluster))


def test_a_spoilt_policy_and_service_are_refused() -> None:
    policy = copy.deepcopy(named("NetworkPolicy")["isthmus-data-plane"])
    _rename(policy["spec"]["ingress"][0], "from", "form")
    assert "form" in str(problems(policy))
    service = copy.deepcopy(named("Service")["isthmus"])
    service["spec"]["ports"][0]["port"] = "7443"
    assert "7443" in str(problems(service))


@pytest.fixture(scope="module")
def definition(shared_data: Path) -> dict[str, Any]:
    """KubeRay's definition of RayCluster, whole: the file that $ISTHMUS_KUBERAY_CRD names, or that of the real data."""
    file = Path(os.environ.get("ISTHMUS_KUBERAY_CRD") or shared_data / "kuberay" / "ray.io_rayclusters.yaml")
    if not file.is_file():
        pytest.skip(f"there is no {file}; ISTHMUS_KUBERAY_CRD can name another file")
    with file.open() as stream:
        crd: dict[str, Any] = yaml.load(stream, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
    return crd


def test_kuberays_own_definition_takes_the_cluster(definition: dict[str, Any]) -> None:
    assert crd_problems(definition, ray_cluster()) == []


def test_kuberays_own_definition_refuses_what_ours_refuses(definition: dict[str, Any]) -> None:
    """But for fields that it has and our cluster does not use."""
    accepted = []
    for spoil, complaint in SPOILT:
        cluster = copy.deepcopy(ray_cluster())
        spoil(cluster)
        if not crd_problems(definition, cluster):
            accepted.append(complaint)
    assert accepted == ["hostNetwork"]


def test_a_definition_is_read_strictly() -> None:
    spec = {"type": "object", "properties": {"suspend": {"type": "boolean"}}, "required": ["suspend"]}
    schema = {"type": "object", "properties": {"apiVersion": {}, "kind": {}, "metadata": {}, "spec": spec}}
    crd = {"spec": {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": schema}}]}}
    thing = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "a"}, "spec": {"suspend": True}}
    assert crd_problems(copy.deepcopy(crd), thing) == []
    assert len(crd_problems(crd, {**thing, "spec": {"suspend": "no", "suspended": True}})) == 2


def _built(folder: Path) -> list[dict[str, Any]]:
    """What kubectl makes of a folder with kustomize."""
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@needs_kubectl
@pytest.mark.parametrize("folder", [BASE, ONE_NODE], ids=lambda folder: folder.name)
def test_kustomize_builds_every_object(folder: Path) -> None:
    built = _built(folder)
    assert sorted(thing["kind"] for thing in built) == sorted(thing["kind"] for thing in manifests())
    assert [problems(thing) for thing in built] == [[] for _ in built]


@needs_kubectl
def test_the_overlay_of_one_node_has_one_worker_and_no_autoscaler(definition: dict[str, Any]) -> None:
    built = _built(ONE_NODE)
    (cluster,) = (thing for thing in built if thing["kind"] == "RayCluster")
    assert crd_problems(definition, cluster) == []
    assert cluster["spec"]["enableInTreeAutoscaling"] is False
    assert "autoscalerOptions" not in cluster["spec"]
    group = cloud_group(cluster)["group"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (1, 1, 1)
    assert {each["spec"]["automountServiceAccountToken"] for each in templates(cluster)} == {False}
    (settings,) = (thing["data"] for thing in built if thing["kind"] == "ConfigMap")
    assert settings["workers"] == "1"


def test_workers_claims_and_pods_fit_each_other() -> None:
    cluster = ray_cluster()
    group, (settings,) = cloud_group(cluster)["group"], named("ConfigMap").values()
    least, most = settings["data"]["workers"].split(":")
    assert (group["minReplicas"], group["maxReplicas"]) == (int(least), int(most))
    assert json.loads(json.loads(group["rayStartParams"]["resources"])) == {RESOURCE: 1}
    for other in (cluster["spec"]["headGroupSpec"], owner_group(cluster)["group"]):
        assert RESOURCE not in other["rayStartParams"].get("resources", "")
    assert parse_labels("isthmus/pool=cloud") == group["labels"]
    assert cluster["spec"]["autoscalerOptions"]["version"] == "v2"


def test_every_container_is_confined() -> None:
    ray_cluster_head, *_ = every = list(templates(ray_cluster()))
    for template in every:
        pod = template["spec"]
        # The autoscaler, on the head alone, asks Kubernetes for pods.
        assert pod["automountServiceAccountToken"] is (template is ray_cluster_head)
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]  # noqa: S108
    assert all(volume.get("sizeLimit") for volume in volumes("emptyDir"))
    for container in containers(ray_cluster()):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        for kind in ("requests", "limits"):
            assert set(container["resources"][kind]) == {"cpu", "memory"}


def test_the_user_is_that_of_the_image() -> None:
    (user,) = set(re.findall(r"^USER (\d+):\d+$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE))
    assert {t["spec"]["securityContext"]["runAsUser"] for t in templates(ray_cluster())} == {int(user)}


def _loader() -> dict[str, Any]:
    (pod,) = manifests(FOLDER / "loader")
    return pod


def test_the_model_is_there_before_the_cloud() -> None:
    """A volume that one node may write cannot be filled beside the cloud's pod, which mounts it read-only."""
    name = _loader()["metadata"]["name"]
    steps = [
        README.index("kubectl apply -f deploy/kubernetes/base/namespace.yaml"),
        README.index("-f deploy/kubernetes/base/volumes.yaml -f deploy/kubernetes/loader/pod.yaml"),
        README.index(f"wait --for=condition=Ready --timeout=10m pod/{name}"),
        README.index(f"cp MODEL {name}:/models/backbone"),
        README.index(f"delete pod {name}"),
        README.index("apply -k deploy/kubernetes/base"),
    ]
    assert steps == sorted(steps)
    assert "--model /models/backbone" in owner_group(ray_cluster())["container"]["args"][0]


def test_the_loader_is_confined_as_the_cloud_is_and_may_write_the_model() -> None:
    pod, cloud = _loader()["spec"], cloud_group(ray_cluster())
    assert problems(_loader()) == []
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"] == cloud["pod"]["securityContext"]
    (container,) = pod["containers"]
    for name in ("image", "securityContext"):
        assert container[name] == cloud["container"][name]
    assert container["volumeMounts"] == [{"name": "model", "mountPath": "/models"}]
    assert pod["volumes"] == [{"name": "model", "persistentVolumeClaim": {"claimName": "isthmus-model"}}]


def test_claims_are_declared() -> None:
    assert {volume["claimName"] for volume in volumes("persistentVolumeClaim")} == set(named("PersistentVolumeClaim"))


def test_the_service_leads_to_the_probed_port_of_the_data_plane() -> None:
    service, cluster = named("Service")["isthmus"], ray_cluster()
    container = cloud_group(cluster)["container"]
    # KubeRay labels its pods with the cluster's and the group's name.
    labels = {"ray.io/cluster": cluster["metadata"]["name"], "ray.io/group": "cloud"}
    assert service["spec"]["selector"] == labels
    (port,) = (each for each in container["ports"] if each["name"] == "data-plane")
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert container["readinessProbe"]["grpc"] == {"port": port["containerPort"]}
    serve = owner_group(cluster)["container"]["args"][0]
    assert f"--listen 0.0.0.0:{port['containerPort']}" in serve
    assert "--advertise" in serve  # so all workers listen on this port
    assert "--tls" not in serve  # the kubelet's gRPC probes speak no TLS


def test_only_the_data_plane_is_open_to_others() -> None:
    cluster, policies = ray_cluster(), named("NetworkPolicy")
    ours = {"ray.io/cluster": cluster["metadata"]["name"]}
    ray, data_plane = policies["isthmus-ray"]["spec"], policies["isthmus-data-plane"]["spec"]
    assert ray["podSelector"]["matchLabels"] == ours
    assert ray["policyTypes"] == ["Ingress", "Egress"]
    assert ray["ingress"] == [{"from": [{"podSelector": {"matchLabels": ours}}]}]
    assert data_plane["podSelector"]["matchLabels"] == named("Service")["isthmus"]["spec"]["selector"]
    assert [port["port"] for rule in data_plane["ingress"] for port in rule["ports"]] == ["data-plane"]
    assert all(rule["from"] for rule in data_plane["ingress"])


def test_the_autoscaler_alone_reaches_the_api_server() -> None:
    policy = named("NetworkPolicy")["isthmus-autoscaler"]["spec"]
    assert policy["podSelector"]["matchLabels"]["ray.io/node-type"] == "head"
    assert [port["port"] for rule in policy["egress"] for port in rule["ports"]] == [443, 6443]


def test_threads_and_drain_fit_the_pods() -> None:
    cluster = ray_cluster()
    serve, cloud = owner_group(cluster)["container"]["args"][0], cloud_group(cluster)
    (threads,) = re.findall(r"--threads (\d+)", serve)
    (grace,) = re.findall(r"--grace (\d+)", serve)
    assert threads == cloud["container"]["resources"]["limits"]["cpu"]
    assert cloud["pod"]["terminationGracePeriodSeconds"] > int(grace)
