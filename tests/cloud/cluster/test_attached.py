"""`attach`, `scale` and `stop` on a cluster of plain objects: a cloud is looked after, changed and ended."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.cluster.fake_actors import FakeActor
from support.cluster.joined import Ray, Stop, Watched, serve
from support.cluster.owners_folder import OwnersFolder

from isthmus.cloud.cluster import attached, cloud_records, watched_cloud
from isthmus.cloud.cluster.joined_cluster import Node
from isthmus.cloud.cluster.watched_cloud import LOST_SECONDS, SILENT_SECONDS
from isthmus.cloud.control.serve_options import ClusterOptions, ServeOptions
from isthmus.cloud.control.serve_state import write_state
from isthmus.common.errors import ConfigError, DiskError, PortInUseError, UnreachableError
from isthmus.protocol.enrolment import ConnectionString
from isthmus.protocol.limits import MAX_WORKERS
from isthmus.protocol.secure.keys import Fingerprint

# Looking after a cloud ------------------------------------------------------------------------------------------------


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
            watched.ray.lose()

    stop.then = then
    watched.look_after(stop)
    assert watched.ray.actor is not first
    assert watched.ray.joined == ["auto"] * 4  # two of them while nobody answers
    assert watched.ray.left == 3
    said = watched.said.getvalue()
    assert said.index("does not answer: waiting for the cluster") < said.index("the cluster answers again")


def test_a_control_store_that_is_silent_for_a_moment_is_waited_for(watched: Watched) -> None:
    polls = int(SILENT_SECONDS / watched_cloud.POLL_SECONDS)
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
    polls = int(LOST_SECONDS / watched_cloud.POLL_SECONDS)
    watched.look_after(Stop(polls))
    assert watched.ray.actor is first
    assert watched.said.getvalue() == ""
    watched.look_after(Stop(polls + 3))
    assert first.was_killed
    assert watched.ray.actor is not first
    assert "the controller does not answer: looking for it anew" in watched.said.getvalue()


def test_a_controller_that_cannot_start_is_looked_for_anew_until_its_port_is_free(watched: Watched) -> None:
    first, stop = watched.ray.actor, Stop(int(LOST_SECONDS / watched_cloud.POLL_SECONDS) + 8)
    watched.ray.controller.failure = taken = PortInUseError("cannot serve metrics")
    watched.ray.prepare = lambda controller: setattr(controller, "failure", taken if stop.look < 34 else None)
    assert watched.look_after(stop)
    assert first.was_killed
    assert not watched.ray.actor.was_killed
    said = watched.said.getvalue()
    assert said.count("cannot serve metrics") == 1
    assert said.index("cannot serve metrics") < said.index("the cluster answers again")


@pytest.mark.parametrize("folder", ["here", "of another machine"])
@pytest.mark.parametrize("controller", ["answers", "is silent", "is gone"])
def test_a_cloud_that_somebody_has_stopped_is_not_started_again(
    watched: Watched, owner: OwnersFolder, folder: str, controller: str
) -> None:
    stop = Stop(10**3)
    watched.ray.cluster.actors["isthmus-cloud-worker-0"] = FakeActor("isthmus-cloud-worker-0", None)
    if folder == "of another machine":
        shutil.rmtree(owner.folder)

    def then(look: int) -> None:
        if look == 3:
            watched.ray.actor.is_silent = controller == "is silent"
            watched.ray.actor.is_gone = controller == "is gone"
            attached.stop("auto", "cloud", 1.0)

    stop.then = then
    assert not watched.look_after(stop)
    assert stop.look == 3
    assert len(watched.ray.cluster.started) == 1
    assert "the cloud cloud was stopped" in watched.said.getvalue()


def test_a_cloud_whose_stop_was_broken_off_is_not_looked_after_any_more(watched: Watched) -> None:
    """Its controller has ended all workers, and answers on."""
    stop = Stop(10**3)
    stop.then = lambda look: setattr(watched.ray.controller, "states", [{"stopped": True, "ready": False}] * (look > 2))
    assert not watched.look_after(stop)
    assert stop.look == 3
    assert len(watched.ray.cluster.started) == 1
    assert watched.said.getvalue().count("the cloud cloud was stopped") == 1


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("what", ["the controller", "the note alone"])
def test_a_cloud_whose_stop_was_broken_off_is_not_attached_to(
    ray: Ray, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(watched_cloud.WatchedCloud, "look_after", lambda self, stop: True)
    if what == "the controller":
        ray.controller.states = [{"stopped": True}] * 2
        with pytest.raises(UnreachableError, match="broken off: `isthmus cloud stop` ends what is left of it"):
            attached.scale("auto", "cloud", 3, 3)
    else:
        (name,) = ray.kept
        ray.kept[name] = ray.kept[name].replace(b'"stopped": false', b'"stopped": true')
    with pytest.raises(UnreachableError, match="the cloud 'cloud' was stopped by a command that is still at it, or"):
        attached.attach("auto", "cloud")
    assert ray.controller.counts == (2, 4)


def test_a_cloud_that_was_stopped_behind_a_link_that_was_cut_is_not_started_again(watched: Watched) -> None:
    stop = Stop(10**3)

    def then(look: int) -> None:
        watched.is_up = look < 3
        if look == 3:
            attached.stop("auto", "cloud", 1.0)  # on another machine, whose link is not cut

    stop.then = then
    assert not watched.look_after(stop)
    assert len(watched.ray.cluster.started) == 1
    said = watched.said.getvalue()
    assert "the cloud cloud was stopped" in said
    assert "answers again" not in said


def test_a_cloud_that_was_stopped_is_served_and_looked_after_again(
    watched: Watched, options: ServeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached.stop("auto", "cloud", 1.0)
    monkeypatch.setattr(attached, "threading", SimpleNamespace(Event=lambda: slow))
    monkeypatch.setattr(watched_cloud, "time", SimpleNamespace(monotonic=lambda: slow.now))
    slow = Stop(5)
    slow.then = lambda look: setattr(watched.ray.actor, "is_silent", look == 2)
    serve(options, cluster=ClusterOptions("auto"))
    assert slow.look == 5  # one answer that is late does not end it
    assert len(watched.ray.cluster.started) == 2


def test_a_control_store_that_does_not_say_whether_the_cloud_was_stopped_is_asked_again(watched: Watched) -> None:
    stop = Stop(10**3)

    def then(look: int) -> None:
        watched.ray.is_mute = 3 <= look < 6
        if look == 2:
            attached.stop("auto", "cloud", 1.0)
            watched.ray.is_mute = True

    stop.then = then
    assert not watched.look_after(stop)
    assert stop.look == 6


def test_an_answer_that_is_late_ends_nothing_though_no_file_says_where_the_cloud_serves(watched: Watched) -> None:
    """A start that was broken off has written none."""
    watched.state.unlink()
    stop = Stop(5)
    stop.then = lambda look: setattr(watched.ray.actor, "is_silent", look == 2)
    assert watched.look_after(stop)
    assert stop.look == 5


def test_machines_that_join_a_cluster_without_tls_are_told_of_once_and_the_cloud_goes_on(watched: Watched) -> None:
    stop = Stop(9)

    def then(look: int) -> None:
        if look in (3, 5):
            watched.ray.nodes.append(Node(f"id{look}", f"10.0.0.{look}", f"gpu-{look}", 1, {}))

    stop.then = then
    assert watched.look_after(stop)
    said = watched.said.getvalue()
    assert said.count("the cluster has several nodes, and Ray's token crosses the network") == 1
    assert not watched.ray.actor.was_killed


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
    watched.state.unlink()
    monkeypatch.setattr(watched_cloud.WatchedCloud, "look_after", lambda self, stop: True)
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
def test_a_cloud_is_stopped_and_its_state_removed(ray: Ray, owner: OwnersFolder, how: str) -> None:
    state = owner.folder / "serving.json"
    state.write_text("{}")  # damaged, which tells nobody to leave it
    actor = ray.actor
    actor.is_silent = how == "silent"
    ray.controller.finishes = how != "unanswered"
    assert attached.stop("auto", "cloud", 4.0) is (how == "in time")
    assert actor.was_killed
    assert not state.exists()
    assert ray.left == 1


@pytest.mark.parametrize("how", ["in time", "silent"])
def test_a_cloud_that_is_stopped_leaves_the_file_of_another_cloud_at_the_same_path(
    ray: Ray, watched: Watched, owner: OwnersFolder, how: str
) -> None:
    """As on a machine that is not the owner's, where `~/.isthmus/cloud` is a cloud of its own."""
    state = {"connection": f"isthmus://h:7443#{Fingerprint(bytes(32))}", "metrics": "", "pid": 1}
    write_state(owner.folder, state)
    ray.actor.is_silent = how == "silent"
    attached.stop("auto", "cloud", 4.0)
    assert watched.state.exists()
    state["connection"] = f"isthmus://h:7443#{owner.pin}"
    write_state(owner.folder, state)
    ray.cluster.actors["isthmus-cloud-worker-0"] = FakeActor("isthmus-cloud-worker-0", None)
    attached.stop("auto", "cloud", 4.0)
    assert not watched.state.exists()


# Where the cloud serves -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("watched")
def test_what_attaches_on_the_owners_machine_says_where_the_cloud_serves_once_it_does(
    ray: Ray, owner: OwnersFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = owner.folder / "serving.json"
    state.unlink()
    ray.controller.spec = dataclasses.replace(ray.controller.spec, metrics="127.0.0.1:9100", places=("10.0.0.9:7443",))
    ray.nodes.append(Node("id9", "10.0.0.9", "gpu-9", 1, {}))
    ray.controller.states = [{"ready": False, "places": []}] * 4
    stop, existed = Stop(6), list[bool]()
    stop.then = lambda look: existed.append(state.exists())
    monkeypatch.setattr(attached, "threading", SimpleNamespace(Event=lambda: stop))
    attached.attach("auto", "cloud")
    assert existed == [False] * 3 + [True] * 3
    written = json.loads(state.read_text())
    connection = ConnectionString.parse(written["connection"])
    assert connection.addresses == ("10.0.0.2:7443", "10.0.0.1:7444", "10.0.0.9:7443")
    assert connection.pin == owner.pin
    assert (written["metrics"], written["pid"]) == ("127.0.0.1:9100", os.getpid())


@pytest.mark.parametrize("advertise", ["", "lb.example"])
def test_a_connection_string_is_written_anew_when_machines_come_and_go(
    ray: Ray, watched: Watched, owner: OwnersFolder, tmp_path: Path, advertise: str
) -> None:
    worker = dataclasses.replace(watched.spec.worker, advertise=advertise)
    watched.watched._spec = dataclasses.replace(watched.spec, places=("10.0.0.1:7443",), worker=worker)
    first = watched.watched.write_first(["10.0.0.2:7443", "10.0.0.1:7444"], tmp_path / "cloud.txt")
    names = {address: Node(f"id-{address}", f"10.0.0.{address}", f"gpu-{address}", 1, {}) for address in (2, 5)}
    ray.nodes.append(names[2])
    stop, written = Stop(9), list[tuple[str, ...]]()

    def then(look: int) -> None:
        written.append(ConnectionString.parse(json.loads(watched.state.read_text())["connection"]).addresses)
        if look == 2:  # a worker goes to a machine that has joined; the other one is started again where it is
            ray.nodes.append(names[5])
            ray.controller.states = [{"places": ["10.0.0.5:7443"]}] * 3
        if look == 5:  # a machine is given back
            ray.nodes.remove(names[2])
            ray.controller.states = [{"places": ["10.0.0.5:7443", "10.0.0.1:7444"]}] * 9

    stop.then = then
    assert watched.look_after(stop)
    said = " ".join(watched.said.getvalue().split())
    told = f"its connection string with them: the new one is in {tmp_path / 'cloud.txt'}, for the edges"
    before = ConnectionString.parse(first).addresses
    if advertise:
        assert set(written) == {before} == {("lb.example:7443",)}
        assert told not in said
        return
    more = ("10.0.0.5:7443", "10.0.0.1:7443", "10.0.0.2:7443", "10.0.0.1:7444")
    less = ("10.0.0.5:7443", "10.0.0.1:7444", "10.0.0.1:7443")
    assert before == ("10.0.0.2:7443", "10.0.0.1:7444", "10.0.0.1:7443")
    assert written == [before] * 2 + [more] * 3 + [less] * 4
    assert said.count(told) == 2
    assert ConnectionString.parse((tmp_path / "cloud.txt").read_text().strip()).addresses == less
    assert ConnectionString.parse((tmp_path / "cloud.txt").read_text().strip()).pin == owner.pin


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("folder", ["none", "of another cloud"])
def test_what_attaches_on_another_machine_writes_nothing(
    ray: Ray, owner: OwnersFolder, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    shutil.rmtree(owner.folder)
    if folder == "of another cloud":
        OwnersFolder(owner.folder.parent)
    monkeypatch.setattr(watched_cloud.WatchedCloud, "look_after", lambda self, stop: True)
    attached.attach("auto", "cloud")
    assert not (owner.folder / "serving.json").exists()


@pytest.mark.usefixtures("watched")
def test_a_disk_that_is_full_does_not_end_what_attaches(
    ray: Ray, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise DiskError("serving.json cannot be written")

    monkeypatch.setattr(cloud_records, "write_state", full)
    looked: list[object] = []
    monkeypatch.setattr(watched_cloud.WatchedCloud, "look_after", lambda self, stop: looked.append(stop))
    attached.attach("auto", "cloud")
    assert len(looked) == 1
    assert "serving.json cannot be written" in capsys.readouterr().err
    assert ray.left == 1


def test_workers_whose_controller_is_away_are_ended_too(ray: Ray) -> None:
    for name in ("isthmus-cloud-worker-0", "isthmus-cloud-worker-7", "isthmus-other-worker-0"):
        ray.cluster.actors[name] = FakeActor(name, None)
    assert not attached.stop("auto", "cloud", 4.0)
    killed = [name for name, actor in ray.cluster.actors.items() if actor.was_killed]
    assert killed == ["isthmus-cloud-worker-0", "isthmus-cloud-worker-7"]


def test_a_cloud_that_is_not_there_is_not_found(ray: Ray, tmp_path: Path) -> None:
    (tmp_path / "serving.json").write_text("{}")
    for command in (
        lambda: attached.attach("auto", "cloud"),
        lambda: attached.scale("auto", "cloud", 1, 1),
        lambda: attached.stop("auto", "cloud", 1.0),
    ):
        with pytest.raises(UnreachableError, match=r"there is no cloud 'cloud' in this cluster: check --name"):
            command()
    assert (tmp_path / "serving.json").exists()
    assert ray.cluster.started == []


@pytest.mark.parametrize(("state", "said"), [("is_silent", "does not answer"), ("is_gone", "is gone: The actor")])
def test_a_controller_that_does_not_answer_is_told_of(ray: Ray, watched: Watched, state: str, said: str) -> None:
    assert watched_cloud.ask(ray.actor, "state")["ready"]
    setattr(ray.actor, state, True)
    with pytest.raises(UnreachableError, match=said):
        watched_cloud.ask(ray.actor, "state")
