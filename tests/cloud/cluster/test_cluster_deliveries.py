"""What the controller of a cloud on a cluster sends its workers, and to stages of a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.cluster.controlled_cloud import Cloud, names, pipeline

from isthmus.cloud.control.autoscaler import GROW_SECONDS, PAUSE_SECONDS
from isthmus.cloud.control.controller import SPREAD_SECONDS
from isthmus.cloud.directory import Peer
from isthmus.cloud.nodes.deliveries import AdapterPlace
from isthmus.protocol.enrolment import REVOKED_FILE, AuthorizedEdges, add_line, revoke
from isthmus.protocol.secure.keys import Fingerprint, generate_edge, load_edge

Log = Callable[[], list[dict[str, Any]]]


# Deliveries -----------------------------------------------------------------------------------------------------------


def test_each_worker_knows_the_tenants_and_the_other_workers_as_such(cloud: Cloud, tmp_path: Path) -> None:
    add_line(cloud.owner.folder / "authorized_edges", generate_edge(tmp_path / "id", "alice"))
    cloud.begin(least=3, most=3)
    delivered = cloud.worker(0).delivery
    assert names(delivered) == {"alice": False, "worker-1": True, "worker-2": True}
    workers = AuthorizedEdges.parse(delivered.workers or "")
    assert workers.find(cloud.worker(1).raw) is not None
    assert workers.find(cloud.worker(0).raw) is None
    tenants = AuthorizedEdges.parse(delivered.authorized_edges or "")
    assert tenants.find(load_edge(tmp_path / "id").public_key().public_bytes_raw()) is not None


def test_tenants_that_come_and_go_are_noticed_and_a_malformed_file_changes_nothing(
    cloud: Cloud, tmp_path: Path
) -> None:
    path = cloud.owner.folder / "authorized_edges"
    cloud.begin()
    assert "alice" not in names(cloud.worker(0).delivery)
    add_line(path, generate_edge(tmp_path / "id", "alice"))
    cloud.turn()
    assert names(cloud.worker(0).delivery)["alice"] is False
    good = path.read_text()
    path.write_text(good + "nonsense\n")
    cloud.turn(2)
    assert "alice" in names(cloud.worker(0).delivery)
    assert [fault for fault in cloud.faults() if "line 2" in fault]
    path.write_text("# nobody any more\n")
    cloud.turn(2)
    assert "alice" not in names(cloud.worker(0).delivery)
    assert cloud.faults() == []


def test_revoked_keys_reach_the_workers_and_a_list_that_is_gone_takes_none_back(cloud: Cloud, tmp_path: Path) -> None:
    generate_edge(tmp_path / "id", "alice")
    key = load_edge(tmp_path / "id").public_key().public_bytes_raw()
    cloud.begin()
    assert revoke(cloud.owner.folder, key)
    assert not revoke(cloud.owner.folder, key)
    cloud.turn()
    delivered = cloud.worker(0).delivery.revoked_edges
    assert AuthorizedEdges.parse(delivered or "").find(key) is not None
    (cloud.owner.folder / REVOKED_FILE).unlink()
    cloud.turn(2)
    assert cloud.worker(0).delivery.revoked_edges == delivered


def test_what_the_owners_folder_does_not_say_is_left_to_the_workers(cloud: Cloud) -> None:
    path = cloud.owner.folder / "authorized_edges"
    path.write_text("nonsense\n")
    cloud.begin()
    assert cloud.worker(0).delivery.authorized_edges is None
    path.write_text("# nobody\n")
    cloud.turn(2)
    assert cloud.worker(0).delivery.authorized_edges == "# nobody\n"


def test_what_a_worker_has_is_not_sent_again(cloud: Cloud, tmp_path: Path) -> None:
    cloud.begin(5)
    worker = cloud.worker(0)
    before = len(worker.deliveries)
    cloud.turn(3)
    assert worker.deliveries[before:] == [None] * 3
    add_line(cloud.owner.folder / "authorized_edges", generate_edge(tmp_path / "id", "alice"))
    cloud.turn(3)
    assert [each is None for each in worker.deliveries[-3:]] == [False, True, True]


def test_the_model_is_at_the_workers_that_serve_it_and_answer(cloud: Cloud) -> None:
    cloud.begin(4, least=4, most=4)
    places = [cloud.worker(number).place for number in range(4)]
    assert cloud.worker(0).delivery.models_at == tuple(places[1:])
    cloud.worker(1).has_model = False
    cloud.worker(2).waits = "its layers to be loaded"
    cloud.turn(2)
    assert cloud.worker(0).delivery.models_at == (places[3],)
    cloud.actor(3).is_silent = True
    cloud.turn(2)
    assert cloud.worker(0).delivery.models_at == ()
    cloud.files_at = "10.0.0.9:40000"
    cloud.actor(3).is_silent = False
    cloud.begin(3)
    assert cloud.worker(0).delivery.models_at == ("10.0.0.9:40000", places[3])


def test_workers_are_told_where_newer_adapters_of_enrolled_tenants_are(cloud: Cloud, tmp_path: Path) -> None:
    tenants = []
    for name in ("alice", "bob", "carol"):
        add_line(cloud.owner.folder / "authorized_edges", generate_edge(tmp_path / name, name))
        tenants.append(Fingerprint.of(load_edge(tmp_path / name).public_key().public_bytes_raw()).digest.hex())
    first, second, revoked = *sorted(tenants[:2]), tenants[2]
    path = cloud.owner.folder / "authorized_edges"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "carol" not in line))
    cloud.begin(3, least=3, most=3)
    cloud.worker(0).adapters = {first: 5, second: 1, revoked: 9}
    cloud.worker(1).adapters = {first: 7}
    cloud.turn(2)
    newest, other = AdapterPlace(first, 7, cloud.worker(1).place), AdapterPlace(second, 1, cloud.worker(0).place)
    assert cloud.worker(0).delivery.adapters == (newest,)
    assert cloud.worker(1).delivery.adapters == (other,)
    assert cloud.worker(2).delivery.adapters == (newest, other)
    for number in range(3):
        cloud.worker(number).adapters = {first: 7, second: 1}
    cloud.turn(2)
    assert [cloud.worker(number).delivery.adapters for number in range(3)] == [()] * 3


def test_workers_hear_of_each_other_and_edges_are_not_sent_to_a_silent_one(cloud: Cloud) -> None:
    cloud.begin(3, least=3, most=3)
    cloud.turn()
    peers = [Peer(cloud.worker(number).place, "serving") for number in range(3)]
    assert cloud.worker(0).updates[-1].peers == (peers[1], peers[2])
    cloud.actor(1).is_silent = True
    cloud.turn(2)
    assert cloud.worker(0).updates[-1].peers == (peers[2],)
    assert cloud.controller.state()["waits"] == ["worker 1: an answer"]
    cloud.actor(1).is_silent = False
    cloud.turn(2)
    assert cloud.worker(0).updates[-1].peers == (peers[1], peers[2])
    assert cloud.controller.state()["waits"] == []


def test_a_worker_with_more_sessions_is_told_to_end_some(cloud: Cloud) -> None:
    cloud.begin()
    cloud.worker(0).sessions = 4
    cloud.turn(2)
    assert cloud.worker(0).updates[-1].end_newest == 0
    cloud.clock.now += SPREAD_SECONDS
    cloud.turn()
    assert cloud.worker(0).updates[-1].end_newest == 2


# Pipelines ------------------------------------------------------------------------------------------------------------


def test_stages_know_the_next_one_and_edges_the_first_alone(cloud: Cloud, tmp_path: Path) -> None:
    add_line(cloud.owner.folder / "authorized_edges", generate_edge(tmp_path / "id", "alice"))
    pipeline(cloud)
    places = [cloud.worker(number).place for number in range(3)]
    assert [cloud.worker(number).delivery.next_stage for number in range(3)] == [places[1], places[2], ""]
    assert ["alice" in names(cloud.worker(number).delivery) for number in range(3)] == [
        True,
        False,
        False,
    ]
    assert names(cloud.worker(1).delivery) == {"worker-0": True, "worker-2": True}
    assert cloud.controller.state()["places"] == [places[0]]
    specs = [cloud.worker(number).spec for number in range(3)]
    assert [(spec.worker.layers, spec.inner, spec.last) for spec in specs] == [
        ("2:3", False, False),
        ("3:4", True, False),
        ("4:5", True, True),
    ]
    cloud.worker(0).adapters = {"aa": 5}
    cloud.turn(2)
    assert cloud.worker(1).delivery.adapters == ()  # a pipeline plugs none in


def test_a_silent_stage_keeps_its_address_and_a_moved_one_has_its_new_one(cloud: Cloud) -> None:
    pipeline(cloud)
    before = cloud.worker(1).place
    cloud.actor(1).is_silent = True
    cloud.turn(3)
    assert cloud.worker(0).delivery.next_stage == before
    cloud.actor(1).is_silent = False
    cloud.worker(1).host, cloud.worker(1).waits = "10.0.0.9", "its model"  # Ray has placed it on another node
    cloud.turn(2)
    assert cloud.worker(0).delivery.next_stage == ""
    cloud.worker(1).waits = ""
    cloud.turn(2)
    assert cloud.worker(0).delivery.next_stage == "10.0.0.9:7444"


def test_a_pipeline_is_never_scaled_by_its_load(cloud: Cloud) -> None:
    pipeline(cloud)
    cloud.worker(0).overdue = cloud.worker(0).waiting = 99
    for _ in range(3):
        cloud.clock.now += GROW_SECONDS + PAUSE_SECONDS
        cloud.turn()
    assert cloud.alive() == [0, 1, 2]
