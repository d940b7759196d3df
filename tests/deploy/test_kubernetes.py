"""The Kubernetes manifests: an API server takes them, their parts fit together, nothing is too open."""

from __future__ import annotations

import copy
import ipaddress
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from support.kubernetes_manifests import DEPLOY, containers, crd_problems, manifests, problems, ray_cluster, templates

from isthmus.cloud.cluster.cluster_spec import RESOURCE, parse_labels
from isthmus.cloud.cluster.issuing import TenantsText
from isthmus.cloud.cluster.ray_tls import CA_CERT, CA_KEY, NODE_FILES, make_ca
from isthmus.common.errors import KeyFileError
from isthmus.protocol.enrolment import add_line
from isthmus.protocol.secure.keyfiles import check_folder
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


def _environments(cluster: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The variables of each of Ray's containers, the autoscaler's among them."""
    ours = [template["spec"]["containers"][0]["env"] for template in templates(cluster)]
    return [*ours, cluster["spec"]["autoscalerOptions"]["env"]]


def _environment(cluster: dict[str, Any]) -> dict[str, str]:
    """What all of Ray's containers have in common."""
    first, *others = _environments(cluster)
    assert all(other == first for other in others)
    return {entry["name"]: entry.get("value", "") for entry in first}


def test_rays_containers_have_the_same_variables_which_are_written_once() -> None:
    cluster = copy.deepcopy(ray_cluster())
    text = (BASE / "raycluster.yaml").read_text()
    assert {name: text.count(f"name: {name}") for name in _environment(cluster)} == dict.fromkeys(
        _environment(cluster), 1
    )
    _owner(cluster)["container"]["env"] = _owner(cluster)["container"]["env"][:-1]
    with pytest.raises(AssertionError):
        _environment(cluster)


def test_rays_tls_and_token_are_where_the_first_container_puts_them() -> None:
    env = _environment(ray_cluster())
    assert (env["RAY_USE_TLS"], env["RAY_AUTH_MODE"]) == ("1", "token")
    assert "RAY_AUTH_TOKEN" not in env  # which every process of the machine's root could read, and every child inherits
    for template in templates(ray_cluster()):
        first, running = template["spec"]["initContainers"][0], template["spec"]["containers"][0]
        (out,) = re.findall(r"--out (\S+)", first["args"][0])
        files = {**NODE_FILES, "RAY_AUTH_TOKEN_PATH": "token"}
        assert {name: env[name] for name in files} == {name: f"{out}/{file}" for name, file in files.items()}
        for container in (first, running):
            assert {"name": "ray-tls", "mountPath": out} in container["volumeMounts"]
        assert first["env"] == [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]


def _readers(cluster: dict[str, Any], secret: str) -> set[str]:
    """The containers that can read a Secret."""
    found = set()
    for template in templates(cluster):
        spec = template["spec"]
        names = {each["name"] for each in spec["volumes"] if each.get("secret", {}).get("secretName") == secret}
        for container in (*spec["initContainers"], *spec["containers"]):
            if names & {mount["name"] for mount in container["volumeMounts"]}:
                found.add(container["name"])
    return found


def test_the_key_of_rays_ca_reaches_no_container_that_runs_on() -> None:
    cluster = copy.deepcopy(ray_cluster())
    assert _readers(cluster, "isthmus-ray-ca") == _readers(cluster, "isthmus-ray") == {"ray-tls"}
    container = _cloud(cluster)["container"]
    container["volumeMounts"] = [*container["volumeMounts"], {"name": "ray-ca", "mountPath": "/run/secrets/ray-ca"}]
    assert _readers(cluster, "isthmus-ray-ca") == {"ray-tls", "cloud"}


def _probe_faults(cluster: dict[str, Any]) -> list[str]:
    """Ray's containers that KubeRay would give probes of its own, and probes of ports that nobody listens on."""
    spec, faults = cluster["spec"], []
    for group, template in zip((spec["headGroupSpec"], *spec["workerGroupSpecs"]), templates(cluster), strict=True):
        container = template["spec"]["containers"][0]
        named = {port["name"]: port["containerPort"] for port in container["ports"]}
        # Ray's: that of the control store on the head, and of the node elsewhere.
        listening = {int(group["rayStartParams"].get("node-manager-port", 6379)), named.get("data-plane")}
        for kind in ("readinessProbe", "livenessProbe"):
            probe = container.get(kind)
            if probe is None:
                faults.append(f"{container['name']} has no {kind}")
                continue
            (port,) = (probe[how]["port"] for how in ("tcpSocket", "grpc") if how in probe)
            if named.get(port, port) not in listening:
                faults.append(f"{container['name']}: nothing listens for the {kind}")
        if "startupProbe" in container:
            faults.append(f"{container['name']} has a startup probe, which KubeRay's Redis job would fail")
    return faults


def test_every_container_of_ray_has_probes_of_its_own() -> None:
    """KubeRay's ask Ray's dashboard, which is not installed."""
    cluster = copy.deepcopy(ray_cluster())
    assert _probe_faults(cluster) == []
    _cloud(cluster)["container"].pop("livenessProbe")
    _owner(cluster)["group"]["rayStartParams"]["node-manager-port"] = "6381"
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["startupProbe"] = {"tcpSocket": {"port": 1}}
    assert [fault.split()[0] for fault in _probe_faults(cluster)] == ["ray-head", "owner:", "owner:", "cloud"]


def _patience(cluster: dict[str, Any]) -> list[int]:
    """The seconds that each group's nodes wait for the control store; Ray's default where nothing is said."""
    found = []
    for group in cluster["spec"]["workerGroupSpecs"]:
        env = {each["name"]: each.get("value") for each in group["template"]["spec"]["containers"][0]["env"]}
        found.append(int(env.get("RAY_gcs_rpc_server_reconnect_timeout_s", 60)))
    return found


def test_workers_wait_for_a_new_head_for_minutes() -> None:
    cluster = copy.deepcopy(ray_cluster())
    assert _patience(cluster) == [600, 600]
    container = _cloud(cluster)["container"]
    container["env"] = [each for each in container["env"] if "reconnect" not in each["name"]]
    assert _patience(cluster) == [600, 60]


def _redis() -> dict[str, Any]:
    (container,) = _named("StatefulSet")["isthmus-redis"]["spec"]["template"]["spec"]["containers"]
    return dict(container)


def test_the_head_may_die() -> None:
    spec, container = ray_cluster()["spec"], _redis()
    where, _, port = spec["gcsFaultToleranceOptions"]["redisAddress"].partition(":")
    assert where == _named("Service")["isthmus-redis"]["metadata"]["name"]
    assert container["ports"] == [{"name": "redis", "containerPort": int(port)}]
    password = spec["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]
    assert container["env"] == [{"name": "REDIS_PASSWORD", "valueFrom": password}]


def _seen_of_redis(script: str, folder: Path) -> tuple[str, str]:
    """What Redis' own script gives a program of that name: its command line, and its standard input."""
    program = folder / "redis-server"
    program.write_text('#!/bin/sh\necho "$*" > "$0.args"\ncat > "$0.input"\n')
    program.chmod(0o700)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "REDIS_PASSWORD": "a-password"}
    subprocess.run(["/bin/sh", "-ec", script], check=True, env=environment, stdin=subprocess.DEVNULL)
    seen = [(folder / f"redis-server.{what}").read_text() for what in ("args", "input")]
    return seen[0], seen[1]


def test_redis_password_is_on_no_command_line(tmp_path: Path) -> None:
    line, settings = _seen_of_redis(_redis()["args"][0], tmp_path)
    assert "a-password" not in line
    assert settings.splitlines() == ["requirepass a-password", "appendonly yes", "dir /data"]
    line, _ = _seen_of_redis('exec redis-server --requirepass "$REDIS_PASSWORD"', tmp_path)
    assert "a-password" in line


def _let_in(policy: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a policy lets a pod of the same namespace in."""
    for rule in policy["spec"]["ingress"]:
        for selector in (peer["podSelector"] for peer in rule["from"]):
            wanted = selector.get("matchLabels", {}).items() <= labels.items()
            listed = (labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", []))
            if wanted and all(listed):
                return True
    return False


def test_only_the_head_and_kuberays_cleanup_reach_redis() -> None:
    """KubeRay empties Redis when a RayCluster is deleted, by a job whose pod has a type of node of its own."""
    policy = _named("NetworkPolicy")["isthmus-redis"]
    ours = {"ray.io/cluster": "isthmus"}
    kinds = ("head", "worker", "redis-cleanup")
    assert [_let_in(policy, {**ours, "ray.io/node-type": kind}) for kind in kinds] == [True, False, True]
    assert not _let_in(policy, {"ray.io/cluster": "another", "ray.io/node-type": "head"})


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


def test_the_readme_makes_every_secret_and_the_root_key_is_in_none() -> None:
    used = {volume["secretName"] for volume in _volumes("secret")}
    assert set(re.findall(r"create secret generic (\S+)", README)) == used | {"isthmus-redis"}
    assert "root_key" not in "".join(file.read_text() for file in FOLDER.rglob("*.yaml"))
    assert not [thing for thing in manifests() if thing["kind"] == "Secret"]


@needs_kubectl
def test_the_readmes_secrets_have_the_keys_that_the_pods_read(tmp_path: Path) -> None:
    """kubectl itself makes each Secret, without a cluster, as the README says."""
    homes = [f"home/{name}" for name in ("issuer_key", "issuer_cert", "authorized_edges", "authorized_nodes")]
    for name in (*homes, "node/node_key", f"ray-ca/{CA_KEY}", f"ray-ca/{CA_CERT}"):
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
        "isthmus-ray": {"token"},
        "isthmus-ray-ca": {CA_KEY, CA_CERT},
        "isthmus-redis": {"password"},
    }
    scripts = "".join(one["args"][0] for one in containers(ray_cluster()))
    for name in ("issuer", "lists", "node", "ray-ca", "ray"):
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
    (port,) = (each for each in container["ports"] if each["name"] == "data-plane")
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


def _secret(run: Path, name: str, files: dict[str, bytes]) -> Path:
    """A folder such as a Secret's volume is: its files are links into another one."""
    version = run / "secrets" / name / "..2026"
    version.mkdir(parents=True)
    (version.parent / "..data").symlink_to(version.name)
    for key, data in files.items():
        (version / key).write_bytes(data)
        (version / key).chmod(0o440)
        (version.parent / key).symlink_to(f"..data/{key}")
    return version.parent


def _run(script: str, place: Path) -> int:
    """Run a container's own script, with `place` before the paths of its volumes."""
    moved = re.sub(r"(?<![\w/])/(run|var|etc)/", rf"{place}/\1/", script)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "POD_IP": "10.0.0.7"}
    return subprocess.run(["/bin/sh", "-euc", moved], check=False, env=environment).returncode


def test_a_pod_gets_a_certificate_for_its_address_and_the_cas_key_does_not_stay(tmp_path: Path) -> None:
    make_ca(tmp_path / "ca", 30)
    files = {name: (tmp_path / "ca" / name).read_bytes() for name in (CA_KEY, CA_CERT)}
    authority = _secret(tmp_path / "run", "ray-ca", files)
    _secret(tmp_path / "run", "ray", {"token": b"of-ray"})
    ray = tmp_path / "etc" / "isthmus" / "ray"
    ray.mkdir(parents=True)
    script = _cloud(ray_cluster())["pod"]["initContainers"][0]["args"][0]
    for _ in range(2):  # the pod's containers start anew on the same volume
        assert _run(script, tmp_path) == 0
    modes = {path.name: path.stat().st_mode & 0o777 for path in ray.iterdir()}
    private, public = (NODE_FILES[f"RAY_TLS_SERVER_{what}"] for what in ("KEY", "CERT"))
    assert modes == {private: 0o600, "token": 0o600, public: 0o644, CA_CERT: 0o644}
    certificate = x509.load_pem_x509_certificate((ray / public).read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert ipaddress.ip_address("10.0.0.7") in names.get_values_for_type(x509.IPAddress)
    assert "isthmus-head-svc.isthmus.svc.cluster.local" in names.get_values_for_type(x509.DNSName)
    (authority / CA_CERT).unlink()  # what fails leaves no copy of the key, either
    assert _run(script, tmp_path) != 0
    (authority / CA_CERT).symlink_to(f"..data/{CA_CERT}")
    (authority / "..data" / CA_CERT).chmod(0o600)
    (authority / "..data" / CA_CERT).write_bytes(b"no certificate")
    assert _run(script, tmp_path) != 0
    assert not (ray / "ca").exists()


def test_a_nodes_folder_is_where_nobody_else_can_put_another_one(tmp_path: Path) -> None:
    """The modes are a kubelet's: 0777 on the disk, and 1777 of what is in memory (`pkg/volume/emptydir`)."""
    cloud = _cloud(ray_cluster())
    home = Path(_environment(ray_cluster())["ISTHMUS_NODE_HOME"])
    (mount,) = (each for each in cloud["container"]["volumeMounts"] if Path(each["mountPath"]) in home.parents)
    (volume,) = (each["emptyDir"] for each in cloud["pod"]["volumes"] if each["name"] == mount["name"])
    generate_edge(tmp_path / "node_key", "nodes")
    _secret(tmp_path / "run", "node", {"node_key": (tmp_path / "node_key").read_bytes()})
    root = tmp_path / mount["mountPath"].lstrip("/")
    root.mkdir(parents=True)
    root.chmod(0o1777 if volume.get("medium") == "Memory" else 0o777)
    for _ in range(2):
        assert _run(cloud["pod"]["initContainers"][1]["args"][0], tmp_path) == 0
    there = tmp_path / str(home).lstrip("/")
    check_folder(there)
    assert load_node(there).public_key() == load_edge(tmp_path / "node_key").public_key()
    root.chmod(0o777)
    with pytest.raises(KeyFileError, match="can be written by everybody"):
        check_folder(there)


def test_the_owners_keys_arrive_as_the_project_wants_them(tmp_path: Path) -> None:
    made = tmp_path / "made"
    generate_root(made)
    make_issuer(made)
    _secret(tmp_path / "run", "issuer", {name: (made / name).read_bytes() for name in ("issuer_key", "issuer_cert")})
    lists = _secret(tmp_path / "run", "lists", {"authorized_edges": b"", "authorized_nodes": b""})
    home = tmp_path / "var" / "lib" / "isthmus" / "cloud"
    home.parent.mkdir(parents=True)
    (tmp_path / "run" / "isthmus").mkdir()
    for _ in range(2):
        assert _run(_owner(ray_cluster())["pod"]["initContainers"][1]["args"][0], tmp_path) == 0
    assert (home / "issuer_key").stat().st_mode & 0o777 == 0o600
    assert load_issuer(home).pin == load_issuer(made).pin
    tenants = TenantsText(home)
    assert tenants() == ""
    enrolled = made / "authorized_edges"
    add_line(enrolled, generate_edge(tmp_path / "id", "alice"))
    line = enrolled.read_text()
    for name, text in (("..2027", line), ("..2028", "malformed")):
        # The kubelet's way to change a Secret under a running pod.
        newer = lists / name
        newer.mkdir()
        (newer / "authorized_edges").write_text(text)
        swap = lists / "..data_tmp"
        swap.symlink_to(newer.name)
        swap.replace(lists / "..data")
        assert tenants() == line  # and of a malformed list the last good one
        assert (tenants.fault == "") == (text == line)
