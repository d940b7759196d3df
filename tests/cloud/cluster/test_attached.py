"""`serve --address`, `attach`, `scale` and `stop`, on a cluster of plain objects: what is checked, started and said."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from support.cluster.fake_actors import FakeActor, FakeCluster
from support.cluster.owners_folder import OwnersFolder
from support.models.tiny import tiny_checkpoint

from isthmus.backbone.checkpoints.built_in import BUILT_IN
from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.cloud.cluster import attached
from isthmus.cloud.cluster.attached import LOST_SECONDS, SILENT_SECONDS, serve_on_cluster
from isthmus.cloud.cluster.cluster_controller import ClusterController
from isthmus.cloud.cluster.cluster_spec import Claims, ClusterSpec
from isthmus.cloud.cluster.joined_cluster import Node
from isthmus.cloud.control import worker_specs
from isthmus.cloud.control.serve_options import ClusterOptions, ServeOptions, TlsFiles
from isthmus.cloud.control.worker import WorkerSpec
from isthmus.cloud.nodes.node_worker import NodeSpec
from isthmus.common.errors import ConfigError, KeyFileError, PortInUseError, UnreachableError
from isthmus.protocol.enrolment import MAX_PLACES, ConnectionString
from isthmus.protocol.limits import MAX_WORKERS
from isthmus.protocol.secure.keys import Fingerprint, load_issuer

NODES = [
    Node("id1", "10.0.0.1", "gpu-1", 2, {}),
    Node("id2", "10.0.0.1", "gpu-1b", 1, {}),
    Node("id3", "10.0.0.1", "head", 0, {}),
]
"""Of one machine, so that Ray needs no TLS."""


class FakeController:
    """A cloud's controller, whose answers a test chooses."""

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec, self.counts = spec, (spec.least, spec.most)
        self.states: list[dict[str, Any]] = []  # what `ready` says before all is well
        self.faults: list[str] = []
        self.failure: Exception | None = None
        self.stops: list[float] = []
        self.finishes = True

    def ready(self) -> dict[str, Any]:
        if self.failure is not None:
            raise self.failure
        usual = {"ready": True, "waits": [], "faults": self.faults, "places": ["10.0.0.2:7443", "10.0.0.1:7444"]}
        known = {"spec": self.spec, "counts": self.counts, "pid": 1}
        return {**usual, **known, **(self.states.pop(0) if self.states else {})}

    def scale(self, least: int, most: int) -> None:
        self.counts = (least, most)

    def stop(self, grace: float) -> bool:
        self.stops.append(grace)
        return self.finishes


class FakeJoined:
    """A cluster that was joined."""

    def __init__(self, ray: Ray, address: str) -> None:
        ray.joined.append(address)
        if ray.refusals:
            ray.refusals -= 1
            raise UnreachableError(f"this machine is no node of a Ray cluster at {address}")
        self._ray, self.control_store = ray, ("10.0.0.1", 6379)

    def nodes(self) -> list[Node]:
        return self._ray.nodes

    def leave(self) -> None:
        self._ray.left += 1


class Ray:
    """The cluster, its nodes, and who has joined and left it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.nodes, self.left, self.refusals = list(NODES), 0, 0
        self.joined: list[str] = []
        self.cluster = FakeCluster(self._make)
        self.prepare: Callable[[FakeController], object] = lambda controller: None
        patch.setattr(attached, "JoinedCluster", lambda address: FakeJoined(self, address))
        for name in ("find_actor", "start_here"):
            patch.setattr(attached, name, getattr(self.cluster, name))
        patch.setattr(attached, "log_to", lambda path: None)
        patch.setattr(attached, "stop_on_signals", lambda stop: None)

    def _make(self, kind: type, spec: ClusterSpec) -> FakeController:
        assert kind is ClusterController
        controller = FakeController(spec)
        self.prepare(controller)
        return controller

    @property
    def actor(self) -> FakeActor:
        return self.cluster.actors["isthmus-cloud-controller"]

    @property
    def controller(self) -> FakeController:
        found: FakeController = self.actor.inner
        return found


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    for name in ("RAY_USE_TLS", "RAY_AUTH_MODE", "ISTHMUS_AUTOSCALED"):
        monkeypatch.delenv(name, raising=False)
    return Ray(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("attached") / "model")


@pytest.fixture
def options(owner: OwnersFolder, model: Path) -> ServeOptions:
    owner.new_node()
    (owner.folder / "root_key").unlink()
    cluster = ClusterOptions("10.0.0.1:6379", detach=True)
    return ServeOptions(str(model), owner.folder, listen="node:7443", workers="2:4", cluster=cluster)


def serve(options: ServeOptions, **changes: Any) -> ConnectionString:
    """The connection string that a detached `serve` prints."""
    said: list[str] = []
    serve_on_cluster(dataclasses.replace(options, **changes), said.append)
    (connection,) = said
    return ConnectionString.parse(connection)


# Serving --------------------------------------------------------------------------------------------------------------


def test_a_detached_cloud_is_started_and_its_string_names_the_workers_and_the_other_nodes(
    ray: Ray, options: ServeOptions, owner: OwnersFolder, tmp_path: Path
) -> None:
    ray.nodes.append(Node("id4", "10.0.0.1", "gpu-4", 1, {}))
    connection = serve(options, connection_file=tmp_path / "connection", metrics="127.0.0.1:9100")
    assert connection.addresses == ("10.0.0.2:7443", "10.0.0.1:7444", "10.0.0.1:7443")
    assert connection.pin == owner.pin
    assert (tmp_path / "connection").read_text() == f"{connection}\n"
    state = json.loads((owner.folder / "serving.json").read_text())
    assert (state["connection"], state["metrics"]) == (str(connection), "127.0.0.1:9100")
    assert (ray.joined, ray.left) == (["10.0.0.1:6379"], 1)
    assert [name for name, _ in ray.cluster.started] == ["isthmus-cloud-controller"]
    assert not ray.actor.was_killed


def test_a_controller_is_told_all_that_workers_need(
    ray: Ray, options: ServeOptions, owner: OwnersFolder, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    cluster = ClusterOptions("auto", "llama", True, 1 << 30, ({"zone": "a"}, {"zone": "b"}), 2.0)
    serve(options, cluster=cluster, threads=3, wipe_freed=True, grace=7.0)
    spec: ClusterSpec = ray.cluster.actors["isthmus-llama-controller"].inner.spec
    assert (spec.cloud, spec.home, spec.least, spec.most) == ("llama", str(owner.folder), 2, 4)
    assert (spec.grace, spec.hours, spec.stages) == (7.0, 2.0, ())
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


def test_what_a_start_waits_for_is_shown_and_each_fault_is_said_once(
    ray: Ray, options: ServeOptions, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attached, "threading", SimpleNamespace(Event=lambda: Stop(99)))
    waits = {"ready": False, "waits": ["worker 0: its model"]}
    ray.prepare = lambda controller: controller.states.extend(
        [{}, waits, *[{**waits, "faults": ["worker 1 has no [key]"]}] * 3, {**waits, "faults": ["another"]}]
    )
    serve(options)
    said = capsys.readouterr().err
    assert said.count("worker 1 has no [key]\n") == 1
    assert said.count("another\n") == 1


def test_a_start_that_is_broken_off_leaves_the_cloud_and_prints_no_string(
    ray: Ray, options: ServeOptions, owner: OwnersFolder, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ray.prepare = lambda controller: setattr(controller, "states", [{}, *[{"ready": False}] * 3])
    monkeypatch.setattr(attached, "stop_on_signals", lambda stop: stop.set())
    said: list[str] = []
    serve_on_cluster(options, said.append)
    assert said == []
    assert not (owner.folder / "serving.json").exists()
    assert "goes on without this process" in " ".join(capsys.readouterr().err.split())
    assert not ray.actor.was_killed


def test_a_cloud_that_is_not_detached_is_looked_after_until_a_signal_and_goes_on(
    ray: Ray, options: ServeOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks: list[object] = []

    def look_after(self: object, stop: object) -> None:
        looks.append(stop)

    monkeypatch.setattr(attached._Watched, "look_after", look_after)
    serve(options, cluster=ClusterOptions("auto"))
    assert len(looks) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "`isthmus cloud attach --address auto --name cloud` looks after it again" in said
    assert (ray.left, ray.actor.was_killed) == (1, False)


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


# Finding a cloud again ------------------------------------------------------------------------------------------------


def test_a_cloud_that_runs_is_found_and_scaled_to_what_is_asked_for_now(ray: Ray, options: ServeOptions) -> None:
    serve(options)
    first = ray.actor
    serve(options)
    assert ray.actor is first
    assert [method for method, _ in first.calls] == ["ready"] * 4
    serve(options, workers="3")
    assert ray.actor is first
    assert ray.controller.counts == (3, 3)


def test_a_cloud_that_runs_with_other_options_is_not_changed(ray: Ray, options: ServeOptions) -> None:
    serve(options)
    for changes in ({"edge_layers": "1:2"}, {"grace": 1.0}, {"listen": "node:7500"}, {"threads": 2}):
        with pytest.raises(ConfigError, match=r"a cloud 'cloud' runs with other options: stop it first"):
            serve(options, **changes)
    assert ray.controller.counts == (2, 4)
    other = ClusterOptions("auto", "other", detach=True)
    assert serve(options, grace=1.0, cluster=other)
    assert len(ray.cluster.actors) == 2


@pytest.mark.parametrize("state", ["is_silent", "is_gone"])
def test_a_controller_that_does_not_answer_makes_room_for_another(ray: Ray, options: ServeOptions, state: str) -> None:
    serve(options)
    first = ray.actor
    setattr(first, state, True)
    assert serve(options)
    assert ray.actor is not first
    assert first.is_gone


def test_a_new_cloud_does_not_take_the_counts_of_one_that_nobody_stopped(
    ray: Ray, options: ServeOptions, owner: OwnersFolder
) -> None:
    counts = owner.folder / "cluster.json"
    counts.write_text('{"least": 9, "most": 9}')
    serve(options)
    assert not counts.exists()
    counts.write_text('{"least": 3, "most": 3}')
    serve(options)
    assert counts.exists()  # of the cloud that runs


def test_a_controller_that_cannot_serve_its_status_ends_the_command(ray: Ray, options: ServeOptions) -> None:
    ray.prepare = lambda controller: setattr(controller, "failure", PortInUseError("cannot serve metrics"))
    with pytest.raises(PortInUseError, match="cannot serve metrics"):
        serve(options)


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
    ray: Ray, options: ServeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.nodes = [NODES[2]]
    with pytest.raises(ConfigError, match=r"no node of the cluster takes workers: start .*--resources='\{\"isthmus\""):
        serve(options)
    assert ray.cluster.started == []
    monkeypatch.setenv("ISTHMUS_AUTOSCALED", "1")
    assert serve(options).addresses == ("10.0.0.2:7443", "10.0.0.1:7444")


# Looking after a cloud ------------------------------------------------------------------------------------------------


class Stop:
    """A signal that comes after some looks; each wait moves the clock."""

    def __init__(self, looks: int) -> None:
        self.now, self._looks = 0.0, looks
        self.then: Callable[[int], object] = lambda look: None
        self.look = 0

    def is_set(self) -> bool:
        return self.look >= self._looks

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        self.look += 1
        self.then(self.look)
        return self.is_set()


class Watched:
    """A cloud that is looked after, with a clock and a control store of the test's own."""

    def __init__(self, ray: Ray, patch: pytest.MonkeyPatch) -> None:
        self.ray, self.is_up, self._patch = ray, True, patch
        self.said = io.StringIO()
        worker = WorkerSpec("/models/tiny", "tiny", "2:2", "fp32", "", "", "node:7443", 1, 1, 1, "")
        self.spec = ClusterSpec("cloud", "/nowhere", NodeSpec("cloud", bytes(32), worker, "", "tiny", ""), 2, 4)
        patch.setattr(attached, "is_open", lambda address: self.is_up)
        joined = FakeJoined(ray, "auto")
        console = Console(file=self.said, width=200)
        self.watched = attached._Watched(joined, ClusterOptions("auto"), self.spec, console)

    def look_after(self, stop: Stop) -> None:
        self._patch.setattr(attached, "time", SimpleNamespace(monotonic=lambda: stop.now))
        self.watched.look_after(stop)


@pytest.fixture
def watched(ray: Ray, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(ray, monkeypatch)


def test_each_new_fault_is_said_and_said_again_when_it_comes_back(watched: Watched) -> None:
    faults: Iterator[list[str]] = iter([["a"], ["a"], ["a", "b"], [], ["a"]])
    stop = Stop(6)
    stop.then = lambda look: setattr(watched.ray.controller, "faults", next(faults, []))
    watched.look_after(stop)
    assert watched.said.getvalue().split() == ["a", "b", "a"]
    assert watched.ray.joined == ["auto"]


def test_a_cluster_whose_control_store_is_lost_is_joined_again_and_the_cloud_started(watched: Watched) -> None:
    first, stop = watched.ray.actor, Stop(40)
    watched.ray.refusals = 2

    def then(look: int) -> None:
        watched.is_up = not 3 <= look <= 20
        if look == 3:
            watched.ray.cluster.actors.clear()  # it comes back with nothing in it

    stop.then = then
    watched.look_after(stop)
    assert watched.ray.actor is not first
    assert watched.ray.joined == ["auto"] * 4  # two of them while nobody answers
    assert watched.ray.left == 3
    said = watched.said.getvalue()
    assert said.index("does not answer: waiting for the cluster") < said.index("the cluster answers again")


def test_a_control_store_that_is_silent_for_a_moment_is_waited_for(watched: Watched) -> None:
    polls = int(SILENT_SECONDS / attached.POLL_SECONDS)
    stop = Stop(polls + 5)
    stop.then = lambda look: setattr(watched, "is_up", not 2 <= look < polls)
    before = len(watched.ray.actor.calls)
    watched.look_after(stop)
    assert (watched.ray.joined, watched.ray.left) == (["auto"], 0)
    assert watched.said.getvalue() == ""
    asked = len(watched.ray.actor.calls) - before
    assert asked == polls + 5 - 1 - (polls - 2)  # nobody asks Ray while its control store is silent


def test_a_controller_that_is_lost_is_looked_for_anew(watched: Watched) -> None:
    first = watched.ray.actor
    first.is_silent = True
    polls = int(LOST_SECONDS / attached.POLL_SECONDS)
    watched.look_after(Stop(polls))
    assert watched.ray.actor is first
    assert watched.said.getvalue() == ""
    watched.look_after(Stop(polls + 3))
    assert first.was_killed
    assert watched.ray.actor is not first
    assert "the controller does not answer: looking for it anew" in watched.said.getvalue()


def test_a_signal_ends_the_wait_for_a_cluster(watched: Watched) -> None:
    watched.is_up, watched.ray.refusals = False, 10**9
    watched.look_after(Stop(40))
    assert "the cluster answers again" not in watched.said.getvalue()
    assert len(watched.ray.joined) > 2


# The other commands ---------------------------------------------------------------------------------------------------


def test_a_cloud_is_attached_to_and_left(
    ray: Ray, watched: Watched, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ray.controller.counts = (7, 7)  # as it was scaled to
    monkeypatch.setattr(attached._Watched, "look_after", lambda self, stop: None)
    attached.attach("auto", "cloud")
    assert "the cloud cloud serves; Ctrl-C leaves it" in capsys.readouterr().err
    assert ray.left == 1
    assert ray.controller.counts == (7, 7)
    assert len(ray.cluster.started) == 1


@pytest.mark.usefixtures("watched")
def test_a_cloud_is_scaled(ray: Ray) -> None:
    attached.scale("auto", "cloud", 3, 5)
    assert ray.controller.counts == (3, 5)
    for least, most in ((0, 3), (4, 3), (1, MAX_WORKERS + 1)):
        with pytest.raises(ConfigError, match=f"{least}:{most} is no number of workers"):
            attached.scale("auto", "cloud", least, most)
    ray.controller.spec = dataclasses.replace(ray.controller.spec, stages=("2:3", "3:4"))
    with pytest.raises(ConfigError, match="is a pipeline of 2 stages"):
        attached.scale("auto", "cloud", 1, 2)
    assert ray.controller.counts == (3, 5)


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("how", ["in time", "unanswered", "silent"])
def test_a_cloud_is_stopped_and_its_state_removed(ray: Ray, tmp_path: Path, how: str) -> None:
    (tmp_path / "serving.json").write_text("{}")
    actor = ray.actor
    actor.is_silent = how == "silent"
    ray.controller.finishes = how != "unanswered"
    assert attached.stop("auto", "cloud", tmp_path, 4.0) is (how == "in time")
    assert actor.was_killed
    assert not (tmp_path / "serving.json").exists()
    assert ray.left == 1


def test_a_cloud_that_is_not_there_is_not_found(ray: Ray, tmp_path: Path) -> None:
    (tmp_path / "serving.json").write_text("{}")
    for command in (
        lambda: attached.attach("auto", "cloud"),
        lambda: attached.scale("auto", "cloud", 1, 1),
        lambda: attached.stop("auto", "cloud", tmp_path, 1.0),
    ):
        with pytest.raises(UnreachableError, match=r"there is no cloud 'cloud' in this cluster: check --name"):
            command()
    assert (tmp_path / "serving.json").exists()
    assert ray.cluster.started == []


@pytest.mark.parametrize(("state", "said"), [("is_silent", "does not answer"), ("is_gone", "is gone: The actor")])
def test_a_controller_that_does_not_answer_is_told_of(ray: Ray, watched: Watched, state: str, said: str) -> None:
    assert attached._ask(ray.actor, "ready")["ready"]
    setattr(ray.actor, state, True)
    with pytest.raises(UnreachableError, match=said):
        attached._ask(ray.actor, "ready")


def test_the_issuer_of_the_string_is_the_clouds(ray: Ray, options: ServeOptions, owner: OwnersFolder) -> None:
    issuer = load_issuer(owner.folder)
    assert serve(options).pin == Fingerprint.of(issuer.root)
    assert serve(options).pin != Fingerprint.of(issuer.certificate.issuer)
