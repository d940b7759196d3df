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
from support.kubernetes_manifests import DEPLOY, containers, crd_problems, manifests, problems, ray_cluster, templates

from isthmus.cloud.cluster.cluster_spec import RESOURCE, parse_labels
from isthmus.cloud.cluster.issuing import TenantsText
from isthmus.cloud.cluster.ray_tls import NODE_FILES
from isthmus.protocol.enrolment import add_line
from isthmus.protocol.secure.keys import generate_edge, generate_root, load_edge, load_issuer, load_node, make_issuer

FOLDER = DEPLOY / "kubernetes"
BASE, ONE_NODE = FOLDER / "base", FOLDER / "one-node"
README = (DEPLOY / "README.md").read_text()
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on this machine")


def _named(kind: str) -> dict[str, dict[str, Any]]:
    return {thing["metadata"]["name"]: thing for thing in manifests() if thing["kind"] == kind}


def _volumes(kind: str) -> list[dict[str, Any]]:
    return [v[kind] for template in templates(ray_cluster()) for v in template["spec"]["volumes"] if kind in v]


@pytest.mark.parametrize("thing", manifests(), ids=lambda thing: f"{thing['kind']}-{thing['metadata']['name']}")
def test_kubernetes_takes_the_object(thing: dict[str, Any]) -> None:
    assert problems(thing) == []


def _group(name: str, cluster: dict[str, Any]) -> dict[str, Any]:
    """A group's entry, its pod's specification, and the one container that runs in it."""
    (group,) = (each for each in cluster["spec"]["workerGroupSpecs"] if each["groupName"] == name)
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    return {"group": group, "container": container, "pod": pod}


def _cloud(cluster: dict[str, Any]) -> dict[str, Any]:
    return _group("cloud", cluster)


def _owner(cluster: dict[str, Any]) -> dict[str, Any]:
    return _group("owner", cluster)


def _rename(where: dict[str, Any], old: str, new: str) -> None:
    where[new] = where.pop(old)


SPOILT: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda c: _rename(c["spec"], "headGroupSpec", "headGroup"), "headGroup"),
    (lambda c: c["spec"].update(suspend="no"), "is not of type 'boolean'"),
    (lambda c: c["spec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}), "is not of type 'string'"),
    (lambda c: c["spec"]["workerGroupSpecs"][0].pop("groupName"), "groupName"),
    (lambda c: c["spec"]["workerGroupSpecs"][1].update(replicas="1"), "is not of type 'integer'"),
    (lambda c: _rename(_cloud(c)["container"], "readinessProbe", "readyProbe"), "readyProbe"),
    (lambda c: _cloud(c)["container"]["readinessProbe"]["grpc"].pop("port"), "port"),
    (lambda c: _cloud(c)["container"]["resources"]["limits"].update(memory="12Gibibytes"), "12Gibibytes"),
    (lambda c: _cloud(c)["pod"]["volumes"][0]["emptyDir"].update(sizeLimit="4 GiB"), "4 GiB"),
    (lambda c: _cloud(c)["pod"]["volumes"][0].update(emptydir={}), "emptydir"),
    (lambda c: _cloud(c)["pod"].update(hostNetwork=True), "hostNetwork"),
    (lambda c: _cloud(c)["pod"]["initContainers"][0].pop("name"), "'name' is a required property"),
    (lambda c: _cloud(c)["container"].update(env=None), "None is not of type 'array'"),
    (lambda c: _cloud(c)["container"].update(volumeMounts=["/tmp"]), "is not of type 'object'"),  # noqa: S108
    (lambda c: _cloud(c)["pod"]["volumes"].append({"name": "tmp", "emptyDir": {}}), "the same name: ['tmp']"),
    (lambda c: _cloud(c)["container"]["ports"].append({"containerPort": 7443}), "the same containerPort"),
    (lambda c: _cloud(c)["container"]["volumeMounts"][1].update(mountPath="/tmp"), "the same mountPath"),  # noqa: S108
]


@pytest.mark.parametrize(("spoil", "complaint"), SPOILT)
def test_a_spoilt_cluster_is_refused(spoil: Callable[[dict[str, Any]], object], complaint: str) -> None:
    cluster = copy.deepcopy(ray_cluster())
    spoil(cluster)
    assert complaint in str(problems(cluster))


def test_a_spoilt_policy_and_service_are_refused() -> None:
    policy = copy.deepcopy(_named("NetworkPolicy")["isthmus-data-plane"])
    _rename(policy["spec"]["ingress"][0], "from", "form")
    assert "form" in str(problems(policy))
    service = copy.deepcopy(_named("Service")["isthmus"])
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
    group = _cloud(cluster)["group"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (1, 1, 1)
    assert {each["spec"]["automountServiceAccountToken"] for each in templates(cluster)} == {False}
    (settings,) = (thing["data"] for thing in built if thing["kind"] == "ConfigMap")
    assert settings["workers"] == "1"


def test_workers_claims_and_pods_fit_each_other() -> None:
    cluster = ray_cluster()
    group, (settings,) = _cloud(cluster)["group"], _named("ConfigMap").values()
    least, most = settings["data"]["workers"].split(":")
    assert (group["minReplicas"], group["maxReplicas"]) == (int(least), int(most))
    assert json.loads(json.loads(group["rayStartParams"]["resources"])) == {RESOURCE: 1}
    for other in (cluster["spec"]["headGroupSpec"], _owner(cluster)["group"]):
        assert RESOURCE not in other["rayStartParams"].get("resources", "")
    assert parse_labels("isthmus/pool=cloud") == group["labels"]
    assert cluster["spec"]["autoscalerOptions"]["version"] == "v2"


def test_rays_own_traffic_is_inside_tls_by_certificates_of_each_pods_address() -> None:
    for template in templates(ray_cluster()):
        env = {entry["name"]: entry.get("value") for entry in template["spec"]["containers"][0]["env"]}
        assert env["RAY_USE_TLS"] == "1"
        first = template["spec"]["initContainers"][0]
        (out,) = re.findall(r"--out (\S+)", first["args"][0])
        assert {variable: env[variable] for variable in NODE_FILES} == {
            variable: f"{out}/{name}" for variable, name in NODE_FILES.items()
        }
        assert first["env"] == [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]
        assert '"$POD_IP"' in first["args"][0]
        assert {"name": "ray-ca", "mountPath": "/run/secrets/ray-ca"} not in template["spec"]["containers"][0][
            "volumeMounts"
        ]


def test_the_head_may_die() -> None:
    spec, redis = ray_cluster()["spec"], _named("StatefulSet")["isthmus-redis"]
    where, _, port = spec["gcsFaultToleranceOptions"]["redisAddress"].partition(":")
    assert where == _named("Service")["isthmus-redis"]["metadata"]["name"]
    (container,) = redis["spec"]["template"]["spec"]["containers"]
    assert container["ports"] == [{"name": "redis", "containerPort": int(port)}]
    password = spec["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]
    assert container["env"] == [{"name": "REDIS_PASSWORD", "valueFrom": password}]


def test_every_container_is_confined() -> None:
    ray_cluster_head, *_ = every = list(templates(ray_cluster()))
    for template in every:
        pod = template["spec"]
        # The autoscaler, on the head alone, asks Kubernetes for pods.
        assert pod["automountServiceAccountToken"] is (template is ray_cluster_head)
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]  # noqa: S108
    assert all(volume.get("sizeLimit") for volume in _volumes("emptyDir"))
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


def test_ray_asks_every_process_for_a_token_from_a_secret() -> None:
    for template in templates(ray_cluster()):
        env = {entry["name"]: entry for entry in template["spec"]["containers"][0]["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "isthmus-ray", "key": "auth_token"}


def test_the_readme_makes_every_secret_and_the_root_key_is_in_none() -> None:
    used = {"isthmus-ray", *(volume["secretName"] for volume in _volumes("secret"))}
    assert set(re.findall(r"create secret generic (\S+)", README)) == used | {"isthmus-redis"}
    assert "root_key" not in "".join(file.read_text() for file in FOLDER.rglob("*.yaml"))
    assert not [thing for thing in manifests() if thing["kind"] == "Secret"]


@needs_kubectl
def test_the_readmes_secrets_have_the_keys_that_the_pods_read(tmp_path: Path) -> None:
    """kubectl itself makes each Secret, without a cluster, as the README says."""
    names = ("issuer_key", "issuer_cert", "authorized_edges", "authorized_nodes", "node_key")
    for name in (*names, "ray-ca/ray_ca_key.pem", "ray-ca/ray_ca_cert.pem"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    made = {}
    for words in re.findall(r"kubectl (-n isthmus create secret generic .*)", README):
        command = ["kubectl", *words.split(), "--dry-run=client", "-o", "yaml"]
        done = subprocess.run(command, cwd=tmp_path, input="token", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        secret = yaml.safe_load(done.stdout)
        assert problems(secret) == []
        made[secret["metadata"]["name"]] = set(secret["data"])
    assert made == {
        "isthmus-issuer": {"issuer_key", "issuer_cert"},
        "isthmus-lists": {"authorized_edges", "authorized_nodes"},
        "isthmus-node": {"node_key"},
        "isthmus-ray": {"auth_token"},
        "isthmus-ray-ca": {"ray_ca_key.pem", "ray_ca_cert.pem"},
        "isthmus-redis": {"password"},
    }
    scripts = "".join(one["args"][0] for one in containers(ray_cluster()))
    for name in ("issuer", "lists", "node", "ray-ca"):
        assert all(f"/run/secrets/{name}/{key}" in scripts for key in made[f"isthmus-{name}"])


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
    assert "--model /models/backbone" in _owner(ray_cluster())["container"]["args"][0]


def test_the_loader_is_confined_as_the_cloud_is_and_may_write_the_model() -> None:
    pod, cloud = _loader()["spec"], _cloud(ray_cluster())
    assert problems(_loader()) == []
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"] == cloud["pod"]["securityContext"]
    (container,) = pod["containers"]
    for name in ("image", "securityContext"):
        assert container[name] == cloud["container"][name]
    assert container["volumeMounts"] == [{"name": "model", "mountPath": "/models"}]
    assert pod["volumes"] == [{"name": "model", "persistentVolumeClaim": {"claimName": "isthmus-model"}}]


def test_claims_are_declared() -> None:
    assert {volume["claimName"] for volume in _volumes("persistentVolumeClaim")} == set(_named("PersistentVolumeClaim"))


def test_the_service_leads_to_the_probed_port_of_the_data_plane() -> None:
    service, cluster = _named("Service")["isthmus"], ray_cluster()
    container = _cloud(cluster)["container"]
    # KubeRay labels its pods with the cluster's and the group's name.
    labels = {"ray.io/cluster": cluster["metadata"]["name"], "ray.io/group": "cloud"}
    assert service["spec"]["selector"] == labels
    (port,) = container["ports"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert container["readinessProbe"]["grpc"] == {"port": port["containerPort"]}
    serve = _owner(cluster)["container"]["args"][0]
    assert f"--listen 0.0.0.0:{port['containerPort']}" in serve
    assert "--advertise" in serve  # so all workers listen on this port
    assert "--tls" not in serve  # the kubelet's gRPC probes speak no TLS


def test_only_the_data_plane_is_open_to_others() -> None:
    cluster, policies = ray_cluster(), _named("NetworkPolicy")
    ours = {"ray.io/cluster": cluster["metadata"]["name"]}
    ray, data_plane = policies["isthmus-ray"]["spec"], policies["isthmus-data-plane"]["spec"]
    assert ray["podSelector"]["matchLabels"] == ours
    assert ray["policyTypes"] == ["Ingress", "Egress"]
    assert ray["ingress"] == [{"from": [{"podSelector": {"matchLabels": ours}}]}]
    assert data_plane["podSelector"]["matchLabels"] == _named("Service")["isthmus"]["spec"]["selector"]
    assert [port["port"] for rule in data_plane["ingress"] for port in rule["ports"]] == ["data-plane"]
    assert all(rule["from"] for rule in data_plane["ingress"])


def test_the_autoscaler_alone_reaches_the_api_server() -> None:
    policy = _named("NetworkPolicy")["isthmus-autoscaler"]["spec"]
    assert policy["podSelector"]["matchLabels"]["ray.io/node-type"] == "head"
    assert [port["port"] for rule in policy["egress"] for port in rule["ports"]] == [443, 6443]


def test_threads_and_drain_fit_the_pods() -> None:
    cluster = ray_cluster()
    serve, cloud = _owner(cluster)["container"]["args"][0], _cloud(cluster)
    (threads,) = re.findall(r"--threads (\d+)", serve)
    (grace,) = re.findall(r"--grace (\d+)", serve)
    assert threads == cloud["container"]["resources"]["limits"]["cpu"]
    assert cloud["pod"]["terminationGracePeriodSeconds"] > int(grace)


def test_the_keys_arrive_as_the_project_wants_them(tmp_path: Path) -> None:
    """The containers' own scripts, on folders like those that a Secret's volume gives."""
    made = tmp_path / "made"
    generate_root(made)
    make_issuer(made)
    generate_edge(made / "node_key", "nodes")
    secrets = {
        "issuer": ("issuer_key", "issuer_cert"),
        "lists": ("authorized_edges", "authorized_nodes"),
        "node": ("node_key",),
    }
    for name, keys in secrets.items():
        version = tmp_path / "run" / "secrets" / name / "..2026"  # a Secret's files are links into such a folder
        version.mkdir(parents=True)
        (version.parent / "..data").symlink_to(version.name)
        for key in keys:
            source = made / key
            (version / key).write_bytes(source.read_bytes() if source.exists() else b"")
            (version / key).chmod(0o440)
            (version.parent / key).symlink_to(f"..data/{key}")
    home = tmp_path / "var" / "lib" / "isthmus" / "cloud"
    home.parent.mkdir(parents=True)
    (tmp_path / "run" / "isthmus").mkdir()
    for group in (_owner, _cloud):
        _, keys_container = group(ray_cluster())["pod"]["initContainers"]
        script = re.sub(r"(?<![\w/])/(run|var)/", rf"{tmp_path}/\1/", keys_container["args"][0])
        for _ in range(2):  # the pod starts anew on the same volume
            subprocess.run(["/bin/sh", "-euc", script], check=True)
    assert (home / "issuer_key").stat().st_mode & 0o777 == 0o600
    assert load_issuer(home).pin == load_issuer(made).pin
    assert load_node(tmp_path / "run" / "isthmus").public_key() == load_edge(made / "node_key").public_key()
    tenants = TenantsText(home)
    assert tenants() == ""
    enrolled = made / "authorized_edges"
    add_line(enrolled, generate_edge(tmp_path / "id", "alice"))
    # The kubelet's way to change a Secret under a running pod.
    newer = tmp_path / "run" / "secrets" / "lists" / "..2027"
    newer.mkdir()
    shutil.copy(enrolled, newer / "authorized_edges")
    swap = newer.parent / "..data_tmp"
    swap.symlink_to(newer.name)
    swap.replace(newer.parent / "..data")
    assert "alice" in tenants()
    assert tenants.fault == ""
