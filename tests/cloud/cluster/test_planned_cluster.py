"""What the controller of a cloud is given for the options of `serve`, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.cluster.joined import NODES, Ray, serve
from support.cluster.owners_folder import OwnersFolder

from isthmus.backbone.checkpoints.built_in import BUILT_IN
from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.cloud.cluster.cluster_spec import Claims, ClusterSpec
from isthmus.cloud.cluster.joined_cluster import Node
from isthmus.cloud.control import worker_specs
from isthmus.cloud.control.serve_options import ClusterOptions, ServeOptions, TlsFiles
from isthmus.common.errors import ConfigError, KeyFileError
from isthmus.protocol.enrolment import MAX_PLACES


def test_a_controller_is_told_all_that_workers_need(
    ray: Ray, options: ServeOptions, owner: OwnersFolder, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    labels = ({"zone": "a"}, {"zone": "b"})
    cluster = ClusterOptions("auto", "llama", True, 1 << 30, labels, 2.0, model_port=7400)
    serve(options, cluster=cluster, threads=3, wipe_freed=True, grace=7.0)
    spec: ClusterSpec = ray.cluster.actors["isthmus-llama-controller"].inner.spec
    assert (spec.cloud, spec.home, spec.least, spec.most) == ("llama", str(owner.folder), 2, 4)
    assert (spec.grace, spec.hours, spec.model_port, spec.stages) == (7.0, 2.0, 7400, ())
    assert spec.claims == Claims(1 << 30, 0, ({"zone": "a"}, {"zone": "b"}))
    assert spec.places == ("10.0.0.1:7443", "10.0.0.1:7443")
    worker = spec.worker
    assert (worker.root, worker.digest) == (owner.pin.digest, Checkpoint(model, "tiny").digest())
    assert worker.hub == ""  # it is a folder
    assert worker.parts.startswith(f"{worker.digest[:16]}-2-2-")
    assert (worker.worker.listen, worker.worker.beside, worker.worker.threads) == ("node:7443", 2, 3)
    assert worker.worker.checkpoint == str(model)
    assert spec.environment["OMP_NUM_THREADS"] == "3"
    assert "glibc.malloc.perturb" in spec.environment["GLIBC_TUNABLES"]
    private = [path.read_text() for path in (owner.folder / "issuer_key", owner.folder.parent / "gpu-1" / "node_key")]
    assert not any(line in repr(spec) for text in private for line in text.splitlines() if "---" not in line)


@pytest.mark.parametrize("workers", ["1", "1:8", "3"])
def test_a_worker_shares_its_machine_with_as_many_as_that_takes_however_many_there_are_now(
    ray: Ray, options: ServeOptions, workers: str
) -> None:
    """Else those that `scale` adds would budget memory and cores that the first ones have."""
    serve(options, workers=workers)
    assert ray.controller.spec.worker_spec(0).worker.beside == 2


def test_threads_that_nobody_has_named_are_for_each_node_to_choose(ray: Ray, options: ServeOptions) -> None:
    serve(options)
    spec = ray.controller.spec
    assert spec.worker.worker.threads == 0
    assert "OMP_NUM_THREADS" not in spec.environment
    assert "GLIBC_TUNABLES" not in spec.environment


def test_a_pipeline_has_a_worker_for_each_stage_and_gpus_are_claimed(ray: Ray, options: ServeOptions) -> None:
    serve(options, workers="1", pipeline=2, device="cuda")
    spec = ray.controller.spec
    assert (spec.least, spec.most, spec.stages) == (2, 2, ("2:3", "3:4"))
    assert spec.claims == Claims(0, 1)


def test_a_load_balancer_is_the_only_place_that_edges_get(ray: Ray, options: ServeOptions) -> None:
    assert serve(options, advertise="lb.example").addresses == ("lb.example:7443",)
    assert ray.controller.spec.worker.advertise == "lb.example"
    ray.actor.kill()
    assert serve(options, advertise="fd00::1").addresses == ("[fd00::1]:7443",)
    assert ray.controller.spec.worker.advertise == "[fd00::1]"


def test_a_connection_string_names_no_more_places_than_an_edge_takes(ray: Ray, options: ServeOptions) -> None:
    places = ["[fd00::1]:7443", *(f"10.1.0.{number}:7443" for number in range(40))]
    ray.prepare = lambda controller: controller.states.extend([{}, {"places": places}])
    connection = serve(options)
    assert len(connection.addresses) == MAX_PLACES
    assert connection.address == "[fd00::1]:7443"


def test_a_model_of_the_hub_is_named_with_its_revision(
    ray: Ray, options: ServeOptions, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = Path(shutil.copytree(model, tmp_path / "snapshots" / commit))
    monkeypatch.setattr(worker_specs, "resolve", lambda name, console: Checkpoint(snapshot, "owner/tiny"))
    serve(options, model="owner/tiny")
    assert ray.controller.spec.worker.hub == f"owner/tiny@{commit}"
    for local in (str(snapshot), BUILT_IN):  # a folder that other nodes may lack, and a name that the hub does not know
        ray.actor.kill()
        serve(options, model=local)
        assert ray.controller.spec.worker.hub == ""


# What is refused before anything is started ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"listen": "127.0.0.1:7443"},
            r"is one machine's: on a cluster write --listen node:7443, .* or 0\.0\.0\.0:7443",
        ),
        ({"listen": "10.0.0.1:0"}, "is one machine's: on a cluster write --listen node:7443"),
        ({"listen": "node:0"}, "port 0 cannot be on a cluster"),
        ({"listen": "node"}, "is no address to listen on"),
        ({"tls": TlsFiles(Path("a"), Path("b"))}, "--tls-cert is for one machine"),
        ({"record": Path("r")}, "--record is for one machine"),
        ({"cluster": ClusterOptions("auto", "My Cloud")}, "'My Cloud' cannot name a cloud"),
        ({"workers": "0"}, "is no number of workers"),
        ({"workers": "3", "pipeline": 2}, "exclude each other"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"device": "cuda", "wipe_freed": True}, "exclude each other"),
    ],
)
def test_options_that_make_no_sense_on_a_cluster_are_refused(
    ray: Ray, options: ServeOptions, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        serve(options, **changes)
    assert ray.cluster.started == []
    for listen in ("0.0.0.0:7443", "[::]:7443"):
        ray.cluster.actors.clear()
        assert serve(options, listen=listen)


def test_an_owner_without_an_enrolled_node_is_told_what_to_do(
    ray: Ray, options: ServeOptions, owner: OwnersFolder
) -> None:
    nodes = owner.folder / "authorized_nodes"
    enrolled = nodes.read_text()
    for spoil in (nodes.unlink, lambda: nodes.write_text("# none\n")):
        spoil()
        with pytest.raises(ConfigError, match=r"no node is enrolled in .*: run `isthmus cloud node-keygen` on each"):
            serve(options)
    assert ray.joined == []
    nodes.write_text(enrolled)
    assert serve(options)


def test_an_owners_folder_that_cannot_be_used_is_refused(ray: Ray, options: ServeOptions, owner: OwnersFolder) -> None:
    owner.folder.chmod(0o777)
    with pytest.raises(KeyFileError, match="another user could put keys"):
        serve(options)
    owner.folder.chmod(0o700)
    (owner.folder / "authorized_edges").write_text("nonsense\n")
    with pytest.raises(ConfigError, match="authorized_edges, line 1"):
        serve(options)
    (owner.folder / "authorized_edges").unlink()
    (owner.folder / "issuer_cert").unlink()
    with pytest.raises(KeyFileError, match=r"issuer_cert does not exist: run `isthmus cloud issuer`"):
        serve(options)
    assert ray.joined == []


def test_a_root_key_in_the_owners_folder_is_warned_of(
    ray: Ray, options: ServeOptions, owner: OwnersFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(options)
    assert "root_key" not in capsys.readouterr().err
    (owner.folder / "root_key").touch(mode=0o600)
    serve(options)
    assert "nothing here needs it: keep it on a machine that is not on the network" in " ".join(
        capsys.readouterr().err.split()
    )


def test_several_nodes_without_tls_are_refused(
    ray: Ray, options: ServeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.nodes.append(Node("id5", "10.0.0.5", "gpu-5", 1, {}))
    with pytest.raises(ConfigError, match=r"Ray's token crosses the network between them in the clear"):
        serve(options)
    assert ray.cluster.started == []
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert serve(options).addresses[-1] == "10.0.0.5:7443"


def test_nodes_that_take_no_workers_are_refused_unless_an_autoscaler_adds_some(
    ray: Ray, options: ServeOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ray.nodes = [NODES[2]]
    with pytest.raises(ConfigError, match=r"no node of the cluster takes workers: start .*--resources='\{\"isthmus\""):
        serve(options)
    assert ray.cluster.started == []
    autoscaled = ClusterOptions("auto", detach=True, autoscaled=True)
    with pytest.raises(ConfigError, match=r"Ray's token crosses the network between them in the clear"):
        serve(options, cluster=autoscaled)
    assert ray.cluster.started == []
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    capsys.readouterr()
    assert serve(options, cluster=autoscaled).addresses == ("10.0.0.2:7443", "10.0.0.1:7444")
    assert "each worker will budget a whole machine: have the" in " ".join(capsys.readouterr().err.split())
    ray.nodes = list(NODES)
    serve(options, cluster=autoscaled)
    assert "whole machine" not in capsys.readouterr().err
