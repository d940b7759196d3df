"""`attach`, `scale` and `stop` on a cluster of plain objects: a cloud is looked after, changed and ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cluster.fake_actors import FakeActor
from support.cluster.joined import Ray, Stop, Watched
from support.cluster.owners_folder import OwnersFolder

from isthmus.cloud.cluster import attached
from isthmus.cloud.cluster.attached import LOST_SECONDS, SILENT_SECONDS
from isthmus.common.errors import ConfigError, UnreachableError
from isthmus.protocol.limits import MAX_WORKERS

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


def test_a_cloud_that_somebody_has_stopped_is_not_started_again(watched: Watched) -> None:
    first, stop = watched.ray.actor, Stop(10**6)

    def then(look: int) -> None:
        if look == 3:
            watched.state.unlink()
            first.kill()

    stop.then = then
    assert not watched.look_after(stop)
    assert stop.look == 3
    assert len(watched.ray.cluster.started) == 1
    assert "the cloud cloud was stopped" in watched.said.getvalue()


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
    monkeypatch.setattr(attached._Watched, "look_after", lambda self, stop: True)
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
    state.write_text("{}")
    actor = ray.actor
    actor.is_silent = how == "silent"
    ray.controller.finishes = how != "unanswered"
    assert attached.stop("auto", "cloud", 4.0) is (how == "in time")
    assert actor.was_killed
    assert state.exists() is (how == "silent")  # nobody says where the owner's folder is
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
    assert attached._ask(ray.actor, "state")["ready"]
    setattr(ray.actor, state, True)
    with pytest.raises(UnreachableError, match=said):
        attached._ask(ray.actor, "state")
