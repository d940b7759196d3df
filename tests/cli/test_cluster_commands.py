"""The commands of a cloud on a cluster, as a user types them: keys and certificates for real, the rest with fakes."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.commands import in_process, refused
from support.models.tiny import tiny_checkpoint
from typer.testing import CliRunner

from isthmus.cli.cloud_commands import app
from isthmus.cloud.cluster import attached, cluster_doctor
from isthmus.cloud.cluster.cluster_doctor import Finding
from isthmus.cloud.cluster.issuing import enrolled_nodes
from isthmus.cloud.cluster.joined_cluster import Node
from isthmus.cloud.cluster.ray_tls import NODE_FILES
from isthmus.cloud.control import supervisor
from isthmus.cloud.control.serve_options import ClusterOptions, ServeOptions
from isthmus.common.errors import ConfigError
from isthmus.protocol.secure.keys import Fingerprint, generate_edge, load_issuer, load_node

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def home(tmp_path: Path, capsys: Capture) -> Path:
    """An owner's folder with a root key."""
    assert in_process(capsys, "cloud", "keygen", "--home", tmp_path / "cloud", "--no-passphrase").returncode == 0
    return tmp_path / "cloud"


# Keys and certificates ------------------------------------------------------------------------------------------------


def test_an_issuer_is_made_and_renewed(home: Path, capsys: Capture) -> None:
    done = in_process(capsys, "cloud", "issuer", "--home", home, "--days", 2, "--no-passphrase")
    assert done.returncode == 0, done.stderr
    first = load_issuer(home)
    assert f"{home / 'issuer_key'} (may sign workers until 20" in done.stdout
    assert stat.S_IMODE((home / "issuer_key").stat().st_mode) == 0o600
    assert in_process(capsys, "cloud", "issuer", "--home", home).returncode == 0
    second = load_issuer(home)
    assert second.certificate.issuer == first.certificate.issuer
    assert second.certificate.not_after > first.certificate.not_after + 4 * 86_400  # 7 days by default


def test_an_issuer_needs_a_root_key_and_a_folder_of_its_own(home: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "bare").mkdir(mode=0o700)
    refused(in_process(capsys, "cloud", "issuer", "--home", tmp_path / "bare"), 30, "root_key does not exist")
    refused(in_process(capsys, "cloud", "issuer", "--home", tmp_path / "none"), 30, "cannot be entered")
    home.chmod(0o777)
    refused(in_process(capsys, "cloud", "issuer", "--home", home), 30, "another user could put keys")
    assert not (home / "issuer_key").exists()
    assert in_process(capsys, "cloud", "issuer", "--home", home, "--days", 0).returncode == 2


def test_a_node_makes_its_key_once_and_the_owner_enrols_it(
    home: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = tmp_path / "node"
    monkeypatch.setenv("ISTHMUS_NODE_HOME", str(node))
    done = in_process(capsys, "cloud", "node-keygen")
    assert done.returncode == 0, done.stderr
    assert f"{node / 'node_key'} (keep it here)" in done.stdout
    refused(in_process(capsys, "cloud", "node-keygen"), 30, "node_key exists and is not overwritten")
    public = node / "node_key.pub"
    done = in_process(capsys, "cloud", "enroll-node", public, "--home", home, "--name", "gpu-1")
    raw = load_node(node).public_key().public_bytes_raw()
    assert done.stdout == f"enrolled node gpu-1 {Fingerprint.of(raw)}\n"
    found = enrolled_nodes(home).find(raw)
    assert found is not None
    assert found.name == "gpu-1"
    refused(in_process(capsys, "cloud", "enroll-node", public, "--home", home), 10, "is already on line 1")
    assert len(enrolled_nodes(home)) == 1


def test_what_is_no_public_key_is_not_enrolled(home: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "key.pub").write_text("nonsense")
    words = ("cloud", "enroll-node", tmp_path / "key.pub", "--home", home)
    refused(in_process(capsys, *words), 10, "is not an Ed25519 public key")
    (tmp_path / "key.pub").unlink()
    refused(in_process(capsys, *words), 30, "key.pub does not exist: ask for the .pub file")
    assert len(enrolled_nodes(home)) == 0


def test_certificates_for_rays_tls_are_made_and_their_variables_printed(tmp_path: Path, capsys: Capture) -> None:
    ca, out = tmp_path / "ca", tmp_path / "node"
    refused(in_process(capsys, "cloud", "ray-certificate", "10.0.0.2", "--ca", ca, "--out", out), 30, "ray-ca` first")
    assert in_process(capsys, "cloud", "ray-ca", "--out", ca).returncode == 0
    refused(in_process(capsys, "cloud", "ray-ca", "--out", ca), 30, "ray_ca_key.pem exists and is not overwritten")
    done = in_process(capsys, "cloud", "ray-certificate", "10.0.0.2", "gpu-2", "--ca", ca, "--out", out)
    assert done.returncode == 0, done.stderr
    lines = {f"export {name}={out / file}" for name, file in NODE_FILES.items()}
    assert set(done.stdout.splitlines()) == {"export RAY_USE_TLS=1", *lines}
    assert all((out / file).is_file() for file in NODE_FILES.values())
    assert in_process(capsys, "cloud", "ray-certificate", "--ca", ca, "--out", out).returncode == 2  # without a name


# A cloud that runs ----------------------------------------------------------------------------------------------------


def given(monkeypatch: pytest.MonkeyPatch, name: str, answer: Any = None) -> list[tuple[Any, ...]]:
    """What a function of `attached` is called with, in the place of the cluster."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(attached, name, lambda *words, **_: calls.append(words) or answer)
    return calls


def test_a_cloud_is_attached_to_by_address_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = given(monkeypatch, "attach")
    for words in ([], ["--address", "10.0.0.1:6379", "--name", "llama"]):
        assert CliRunner().invoke(app, ["attach", *words]).exit_code == 0
    assert calls == [("auto", "cloud"), ("10.0.0.1:6379", "llama")]


@pytest.mark.parametrize(("text", "counts"), [("3", (3, 3)), ("2:6", (2, 6)), ("1:1", (1, 1))])
def test_a_cloud_is_scaled_to_one_number_or_two(
    monkeypatch: pytest.MonkeyPatch, text: str, counts: tuple[int, int]
) -> None:
    calls = given(monkeypatch, "scale")
    assert CliRunner().invoke(app, ["scale", text]).exit_code == 0
    assert calls == [("auto", "cloud", *counts)]


@pytest.mark.parametrize("text", ["", "x", "2:x", ":3", "1.5", "2:3:4"])
def test_what_is_no_number_of_workers_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    calls = given(monkeypatch, "scale")
    with pytest.raises(ConfigError, match="is no number of workers: write N, or MIN:MAX"):
        CliRunner().invoke(app, ["scale", "--", text], catch_exceptions=False)
    assert calls == []


@pytest.mark.parametrize(("finished", "code"), [(True, 0), (False, 60)])
def test_stopping_a_cloud_tells_whether_all_calls_were_answered(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, finished: bool, code: int
) -> None:
    calls = given(monkeypatch, "stop", finished)
    done = in_process(capsys, "cloud", "stop", "--grace", 5)
    assert done.returncode == code
    assert ("stopped after 5 s with calls unanswered" in done.stderr) is not finished
    assert calls == [("auto", "cloud", 5.0)]


@pytest.mark.parametrize("as_json", [True, False])
def test_the_doctor_ends_with_a_code_of_its_own_where_something_is_to_be_mended(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path, as_json: bool
) -> None:
    findings = [Finding("nodes", True, "2 nodes")]
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(cluster_doctor, "examine", lambda *words: asked.append(words) or findings)
    words = ("cloud", "doctor", "--home", tmp_path, "--model", "tiny", *(["--json"] if as_json else []))
    assert in_process(capsys, *words).returncode == 0
    findings.append(Finding("the issuer", False, "renew it"))
    done = in_process(capsys, *words)
    assert done.returncode == 74
    assert asked == [("auto", "cloud", tmp_path, "tiny")] * 2
    if as_json:
        assert json.loads(done.stdout) == {"findings": [each.as_dict() for each in findings]}
    else:
        assert [line.split()[0] for line in done.stdout.splitlines()] == ["ok", "mend"]


# Serving on a cluster -------------------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ServeOptions]:
    """The options that `serve` with some words would serve by."""
    found: list[tuple[str, ServeOptions]] = []
    monkeypatch.setattr(attached, "serve_on_cluster", lambda options, ready: found.append(("cluster", options)))
    monkeypatch.setattr(supervisor, "serve", lambda options, ready: found.append(("here", options)) or True)

    def serve(*words: str) -> ServeOptions:
        CliRunner().invoke(app, ["serve", "--model", "tiny", *words], catch_exceptions=False)
        where, options = found.pop()
        assert (where == "cluster") == ("--address" in words)
        return options

    return serve


def test_serve_with_an_address_is_on_a_cluster(served: Callable[..., ServeOptions]) -> None:
    assert served().cluster is None
    assert served("--address", "auto").cluster == ClusterOptions("auto")
    words = ["--address", "10.0.0.1:6379", "--name", "llama", "--detach", "--worker-memory", "8GiB"]
    labels = ["--node-labels", "zone=a,disk=ssd", "--node-labels", "zone=b"]
    further = ["--certificate-hours", "2", "--autoscaled", "--model-port", "7400"]
    assert served(*words, *labels, *further).cluster == ClusterOptions(
        "10.0.0.1:6379", "llama", True, 8 << 30, ({"zone": "a", "disk": "ssd"}, {"zone": "b"}), 2.0, True, 7400
    )


@pytest.mark.parametrize(
    "words",
    [
        ("--name", "llama"),
        ("--detach",),
        ("--worker-memory", "1GiB"),
        ("--node-labels", "zone=a"),
        ("--certificate-hours", "2"),
        ("--autoscaled",),
        ("--model-port", "7400"),
    ],
)
def test_options_of_a_cluster_need_its_address(served: Callable[..., ServeOptions], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="are for a cluster: give its --address"):
        served(*words)
    assert served(*words, "--address", "auto").cluster is not None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--node-labels", "zone"), "'zone' is no label of a node"),
        (("--worker-memory", "8 GB"), "is not a size"),
    ],
)
def test_malformed_options_of_a_cluster_are_refused(
    served: Callable[..., ServeOptions], words: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        served("--address", "auto", *words)


def test_a_cloud_that_cannot_be_on_a_cluster_gives_one_line(
    home: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_checkpoint("llama", tmp_path / "model")
    words = ("cloud", "serve", "--model", model, "--home", home, "--address", "auto")
    on_nodes = (*words, "--listen", "node:7443")
    refused(in_process(capsys, *words), 10, "is one machine's: on a cluster write --listen node:7443")
    refused(in_process(capsys, *on_nodes), 30, "issuer_key does not exist: run `isthmus cloud")
    assert in_process(capsys, "cloud", "issuer", "--home", home, "--no-passphrase").returncode == 0
    refused(in_process(capsys, *on_nodes), 10, "no node is enrolled in")
    generate_edge(tmp_path / "node_key", "gpu-1")
    enrol = ("cloud", "enroll-node", tmp_path / "node_key.pub", "--home", home)
    assert in_process(capsys, *enrol).returncode == 0
    nodes = [Node("id1", "10.0.0.1", "gpu-1", 1, {}), Node("id2", "10.0.0.2", "gpu-2", 1, {})]
    monkeypatch.setattr(attached, "JoinedCluster", lambda address: SimpleNamespace(nodes=lambda: nodes))
    monkeypatch.setattr(attached, "log_to", lambda path: None)
    for name in ("RAY_USE_TLS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    refused(in_process(capsys, *on_nodes), 10, "crosses the network between them in the clear: set RAY_USE_TLS=1")
    nodes[:] = [Node("id1", "10.0.0.1", "head", 0, {})]
    refused(in_process(capsys, *on_nodes), 10, "Ray asks for no token")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    refused(in_process(capsys, *on_nodes), 10, "no node of the cluster takes workers")
