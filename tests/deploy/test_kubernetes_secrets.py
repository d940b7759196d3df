"""The Secrets of the Kubernetes manifests: what the README makes, and what the pods make of it."""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from support.kubernetes_manifests import (
    DEPLOY,
    cloud_group,
    containers,
    environment_of,
    manifests,
    owner_group,
    problems,
    ray_cluster,
    volumes,
)

from isthmus.cloud.cluster.issuing import TenantsText
from isthmus.cloud.cluster.ray_tls import CA_CERT, CA_KEY, NODE_FILES, make_ca
from isthmus.common.errors import KeyFileError
from isthmus.protocol.enrolment import add_line
from isthmus.protocol.secure.keyfiles import check_folder
from isthmus.protocol.secure.keys import generate_edge, generate_root, load_edge, load_issuer, load_node, make_issuer

FOLDER = DEPLOY / "kubernetes"
README = (DEPLOY / "README.md").read_text()
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on this machine")


def test_the_readme_makes_every_secret_and_the_root_key_is_in_none() -> None:
    used = {volume["secretName"] for volume in volumes("secret")}
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
    script = cloud_group(ray_cluster())["pod"]["initContainers"][0]["args"][0]
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
    cloud = cloud_group(ray_cluster())
    home = Path(environment_of(ray_cluster())["ISTHMUS_NODE_HOME"])
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
        assert _run(owner_group(ray_cluster())["pod"]["initContainers"][1]["args"][0], tmp_path) == 0
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
