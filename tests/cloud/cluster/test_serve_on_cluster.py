"""`serve --address` on a cluster of plain objects: what is started, found and said."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.cluster.joined import Ray, Stop, serve
from support.cluster.owners_folder import OwnersFolder

from isthmus.cloud.cluster import attached, watched_cloud
from isthmus.cloud.cluster.attached import serve_on_cluster
from isthmus.cloud.cluster.joined_cluster import Node
from isthmus.cloud.control.serve_options import ClusterOptions, ServeOptions
from isthmus.common.errors import ConfigError, PortInUseError, UnreachableError
from isthmus.protocol.secure.keys import Fingerprint, load_issuer

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


def test_a_start_ends_where_somebody_stops_the_cloud(
    ray: Ray, options: ServeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attached, "threading", SimpleNamespace(Event=lambda: Stop(99)))
    waits = {"ready": False, "waits": ["worker 0: its model"]}
    ray.prepare = lambda controller: controller.states.extend([{}, waits, *[{**waits, "stopped": True}] * 200])
    with pytest.raises(UnreachableError, match="the cloud 'cloud' was stopped"):
        serve(options)


def test_a_cloud_that_is_not_detached_is_looked_after_until_a_signal_and_goes_on(
    ray: Ray, options: ServeOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks: list[object] = []

    def look_after(self: object, stop: object) -> bool:
        looks.append(stop)
        return True

    monkeypatch.setattr(watched_cloud.WatchedCloud, "look_after", look_after)
    serve(options, cluster=ClusterOptions("auto"))
    assert len(looks) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "`isthmus cloud attach --address auto --name cloud` looks after it again" in said
    assert (ray.left, ray.actor.was_killed) == (1, False)


def test_the_issuer_of_the_string_is_the_clouds(ray: Ray, options: ServeOptions, owner: OwnersFolder) -> None:
    issuer = load_issuer(owner.folder)
    assert serve(options).pin == Fingerprint.of(issuer.root)
    assert serve(options).pin != Fingerprint.of(issuer.certificate.issuer)


# Finding a cloud again ------------------------------------------------------------------------------------------------


def test_a_cloud_that_runs_is_found_and_scaled_to_what_is_asked_for_now(ray: Ray, options: ServeOptions) -> None:
    serve(options)
    first = ray.actor
    serve(options)
    assert ray.actor is first
    assert [method for method, _ in first.calls] == ["state"] * 4
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


def test_a_controller_whose_port_was_taken_makes_room_for_another(ray: Ray, options: ServeOptions) -> None:
    """As one that Ray has started while nobody was there who could be told."""
    serve(options)
    first = ray.actor
    ray.controller.failure = PortInUseError("cannot serve metrics")
    assert serve(options)
    assert ray.actor is not first
    assert first.was_killed


def test_a_controller_that_a_broken_off_stop_has_left_makes_room_for_another(ray: Ray, options: ServeOptions) -> None:
    """It has no workers, and would start none."""
    serve(options)
    first = ray.actor
    ray.controller.states = [{"stopped": True}]
    assert serve(options)
    assert ray.actor is not first
    assert first.is_gone


def test_a_cloud_that_is_served_again_is_noted_as_it_is_served_now(
    ray: Ray, options: ServeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a later loss would be taken for its stop, and nobody would ask for TLS where machines are added."""
    serve(options)
    (name,) = ray.kept
    ray.kept[name] = ray.kept[name].replace(b'"stopped": false', b'"stopped": true')
    first = ray.actor
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    serve(options, cluster=ClusterOptions("auto", "cloud", detach=True, autoscaled=True))
    assert ray.actor is first
    note = json.loads(ray.kept[name])
    assert (note["autoscaled"], note["stopped"]) == (True, False)


def test_a_new_cloud_does_not_take_the_counts_of_one_that_nobody_stopped(
    ray: Ray, options: ServeOptions, owner: OwnersFolder
) -> None:
    counts = owner.folder / "cluster-cloud.json"
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
