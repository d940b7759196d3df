"""What `isthmus cloud doctor` looks up on a node."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.cluster.owners_folder import OwnersFolder
from support.models.tiny import tiny_checkpoint

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.cloud.cluster import node_probe
from isthmus.cloud.cluster.node_probe import PACKAGES, clock, probe
from isthmus.cloud.cluster.ray_tls import issue_node, make_ca
from isthmus.cloud.control.ports import Listener


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, owner: OwnersFolder) -> Path:
    """A node that is this machine, with a key, and neither TLS nor a token."""
    for name in ("RAY_USE_TLS", "RAY_AUTH_MODE", "RAY_TLS_SERVER_CERT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(node_probe, "_open_ports", tuple)
    home = owner.new_node()
    monkeypatch.setenv("ISTHMUS_NODE_HOME", str(home))
    return home


def test_a_node_tells_its_versions_key_and_model(here: Path, tmp_path: Path) -> None:
    model = tiny_checkpoint("llama", tmp_path / "model")
    facts = probe(str(model))
    assert set(facts.versions) == {"python", *PACKAGES}
    assert len(facts.node_key) == 32
    assert (facts.key_fault, facts.digest) == ("", Checkpoint(model, "tiny").digest())
    assert (facts.tls, facts.token, facts.tls_until) == (False, False, None)
    assert abs(clock() - time.time()) < 3600
    (here / "node_key").unlink()
    bare = probe(str(tmp_path / "none"))
    assert (bare.node_key, bare.digest) == (b"", "")
    assert "run `isthmus cloud node-keygen`" in bare.key_fault
    assert probe("").digest == ""


def test_a_damaged_model_on_a_node_is_told_and_not_taken_for_none(here: Path, tmp_path: Path) -> None:
    model = tiny_checkpoint("llama", tmp_path / "model")
    whole = probe(str(model)).digest
    (model / "model.safetensors").write_bytes(b"damaged")
    assert probe(str(model)).digest not in ("", whole)
    (model / "model.safetensors").unlink()
    assert probe(str(model)).digest.startswith("unreadable (")


def test_the_end_of_rays_certificate_is_read_where_ray_uses_tls(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_ca(tmp_path / "ca", 30)
    for name, value in issue_node(tmp_path / "ca", ["10.0.0.1"], tmp_path / "tls", 10).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_AUTH_MODE", "Token")
    facts = probe("")
    assert (facts.tls, facts.token) == (True, True)
    assert facts.tls_until is not None
    assert abs(facts.tls_until - time.time() - 10 * 86_400) < 3600
    (tmp_path / "tls" / "ray_tls_cert.pem").write_text("nonsense")
    assert probe("").tls_until is None
    monkeypatch.setenv("RAY_TLS_SERVER_CERT", str(tmp_path / "none"))
    assert probe("").tls_until is None


@pytest.mark.parametrize(
    ("name", "words", "is_one"),
    [
        ("raylet", ["/opt/ray/raylet", "--port=1"], True),
        ("gcs_server", [], True),
        ("python", ["ray::NodeWorker"], True),
        ("python", ["python", "/venv/ray/dashboard/agent.py"], True),
        ("sshd", ["sshd", "-D"], False),
        ("python", ["python", "array.py"], False),
        ("python", None, False),
    ],
)
def test_rays_processes_are_told_from_others(name: str, words: list[str] | None, is_one: bool) -> None:
    assert node_probe._is_rays({"name": name, "cmdline": words}) is is_one


def test_ports_that_this_machine_alone_can_reach_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    ours = SimpleNamespace(info={"name": "raylet", "cmdline": []})
    strangers = SimpleNamespace(info={"name": "sshd", "cmdline": []})
    monkeypatch.setattr(psutil, "process_iter", lambda names: [ours, strangers])

    def listeners(processes: list[object], name_of: object) -> list[Listener]:
        assert processes == [ours]
        listening = (("127.0.0.1", 1), ("::1", 2), ("10.0.0.2", 30), ("::", 4), ("10.0.0.2", 30))
        return [Listener("raylet", 7, host, port) for host, port in listening]

    monkeypatch.setattr(node_probe, "listeners_of", listeners)
    assert node_probe._open_ports() == ("raylet 30", "raylet 4")
