"""Ray in the Kubernetes manifests: its TLS, token and probes, and a head that may die."""

from __future__ import annotations

import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.kubernetes_manifests import (
    DEPLOY,
    cloud_group,
    environment_of,
    named,
    owner_group,
    ray_cluster,
    templates,
)

from isthmus.cloud.cluster.ray_tls import NODE_FILES

BASE = DEPLOY / "kubernetes" / "base"


def test_rays_containers_have_the_same_variables_which_are_written_once() -> None:
    cluster = copy.deepcopy(ray_cluster())
    text = (BASE / "raycluster.yaml").read_text()
    assert {name: text.count(f"name: {name}") for name in environment_of(cluster)} == dict.fromkeys(
        environment_of(cluster), 1
    )
    owner_group(cluster)["container"]["env"] = owner_group(cluster)["container"]["env"][:-1]
    with pytest.raises(AssertionError):
        environment_of(cluster)


def test_rays_tls_and_token_are_where_the_first_container_puts_them() -> None:
    env = environment_of(ray_cluster())
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
    container = cloud_group(cluster)["container"]
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
    cloud_group(cluster)["container"].pop("livenessProbe")
    owner_group(cluster)["group"]["rayStartParams"]["node-manager-port"] = "6381"
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
    container = cloud_group(cluster)["container"]
    container["env"] = [each for each in container["env"] if "reconnect" not in each["name"]]
    assert _patience(cluster) == [600, 60]


def _redis() -> dict[str, Any]:
    (container,) = named("StatefulSet")["isthmus-redis"]["spec"]["template"]["spec"]["containers"]
    return dict(container)


def test_the_head_may_die() -> None:
    spec, container = ray_cluster()["spec"], _redis()
    where, _, port = spec["gcsFaultToleranceOptions"]["redisAddress"].partition(":")
    assert where == named("Service")["isthmus-redis"]["metadata"]["name"]
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
    policy = named("NetworkPolicy")["isthmus-redis"]
    ours = {"ray.io/cluster": "isthmus"}
    kinds = ("head", "worker", "redis-cleanup")
    assert [_let_in(policy, {**ours, "ray.io/node-type": kind}) for kind in kinds] == [True, False, True]
    assert not _let_in(policy, {"ray.io/cluster": "another", "ray.io/node-type": "head"})
