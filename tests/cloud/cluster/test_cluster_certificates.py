"""Whose workers the controller of a cloud on a cluster certifies, and which it ends."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
from support.cluster.controlled_cloud import Cloud, names

from isthmus.cloud.cluster.cluster_controller import RETRY_SECONDS
from isthmus.cloud.cluster.issuing import SETTLED_SECONDS
from isthmus.protocol.enrolment import add_line
from isthmus.protocol.secure.certificates import CertificateRequest, WorkerCertificate
from isthmus.protocol.secure.keys import (
    Fingerprint,
    load_node,
    make_issuer,
)

Log = Callable[[], list[dict[str, Any]]]


def test_a_worker_on_a_node_that_is_not_enrolled_is_ended_and_nobody_knows_it(cloud: Cloud) -> None:
    home = cloud.owner.new_node("gpu-9", enrolled=False)
    stranger = load_node(home)
    cloud.prepare = lambda worker: setattr(worker, "node", stranger if worker.number == 1 else worker.node)
    cloud.begin()
    assert cloud.actor(1).was_killed
    assert not cloud.worker(1).is_certified
    key = Fingerprint.of(stranger.public_key().public_bytes_raw())
    fault = f"worker 1 on gpu-1 (10.0.0.2) may not serve: the node's key {key} is not enrolled"
    assert [each.startswith(fault) for each in cloud.faults()] == [True]
    assert names(cloud.worker(0).delivery) == {}
    assert cloud.may_fetch() == (cloud.worker(0).raw,)
    add_line(cloud.owner.folder / "authorized_nodes", (home / "node_key.pub").read_text(), "gpu-9")
    cloud.clock.now += RETRY_SECONDS
    cloud.turn(3)
    assert cloud.worker(1).is_certified
    assert cloud.faults() == []
    assert names(cloud.worker(0).delivery) == {"worker-1": True}
    assert cloud.may_fetch() == (cloud.worker(0).raw, cloud.worker(1).raw)
    assert cloud.controller.state()["ready"]


def test_a_worker_whose_node_is_not_enrolled_any_more_is_ended(cloud: Cloud) -> None:
    cloud.begin()
    assert cloud.controller.state()["ready"]
    nodes = cloud.owner.folder / "authorized_nodes"
    enrolled = nodes.read_text()
    cloud.worker(1).node = cloud.owner.node_key("gpu-2")
    cloud.turn()
    assert cloud.alive() == [0, 1]
    nodes.write_text(enrolled)  # without the second node
    cloud.turn()
    cloud.shift_owners_clock(SETTLED_SECONDS)
    cloud.turn(2)
    assert cloud.alive() == [0]
    assert names(cloud.worker(0).delivery) == {}


def test_a_silent_worker_whose_node_is_not_enrolled_any_more_is_forgotten_by_the_others(cloud: Cloud) -> None:
    cloud.begin()
    assert names(cloud.worker(0).delivery) == {"worker-1": True}
    cloud.actor(1).is_silent = True
    nodes = cloud.owner.folder / "authorized_nodes"
    enrolled = nodes.read_text()
    cloud.worker(1).node = cloud.owner.node_key("gpu-2")
    cloud.turn(2)
    assert names(cloud.worker(0).delivery) == {"worker-1": True}  # its own node's key has signed for it
    nodes.write_text("# none\n")
    cloud.turn()
    cloud.shift_owners_clock(SETTLED_SECONDS)
    cloud.turn(2)
    assert names(cloud.worker(0).delivery) == {}
    assert cloud.may_fetch() == ()
    nodes.write_text(enrolled)


def test_a_worker_whose_nodes_clock_is_wrong_gets_no_certificate_until_it_is_right(cloud: Cloud) -> None:
    cloud.now = lambda: time.time() - 3600
    cloud.begin()
    assert cloud.alive() == [0, 1]
    assert not cloud.worker(0).is_certified
    assert all("gets no certificate" in fault and "set the wrong clock" in fault for fault in cloud.faults())
    assert len(cloud.faults()) == 2
    assert cloud.may_fetch() == ()
    cloud.now = time.time
    cloud.turn(2)
    assert cloud.worker(0).is_certified
    assert cloud.faults() == []


def test_workers_go_on_while_the_owners_clock_is_wrong(cloud: Cloud) -> None:
    cloud.begin()
    cloud.now = lambda: time.time() + 200  # so that requests are new ones
    cloud.shift_owners_clock(4000)
    cloud.turn(2)
    assert len(cloud.faults()) == 2
    assert cloud.alive() == [0, 1]
    assert names(cloud.worker(0).delivery) == {"worker-1": True}
    assert cloud.controller.state()["ready"]
    cloud.shift_owners_clock(-4000)
    cloud.turn(2)
    assert cloud.faults() == []


@pytest.mark.parametrize("text", ["", None])
def test_a_list_of_nodes_that_is_short_or_away_for_a_moment_ends_nobody(cloud: Cloud, text: str | None) -> None:
    """An editor that is writing it."""
    cloud.begin()
    nodes = cloud.owner.folder / "authorized_nodes"
    good = nodes.read_text()
    nodes.unlink() if text is None else nodes.write_text(text)
    cloud.now = lambda: time.time() + 200  # with new requests, which are checked anew
    cloud.turn(2)
    nodes.write_text(good)
    cloud.shift_owners_clock(SETTLED_SECONDS)
    cloud.turn(2)
    assert cloud.alive() == [0, 1]
    assert names(cloud.worker(0).delivery) == {"worker-1": True}
    assert cloud.faults() == []


def test_a_worker_that_asks_for_another_ones_key_is_ended(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud.begin()
    first, second = cloud.worker(0), cloud.worker(1)
    honest = first.exchange
    other = CertificateRequest.make(cloud.node, cloud.owner.pin.digest, second.raw, time.time())
    monkeypatch.setattr(first, "exchange", lambda *given: dataclasses.replace(honest(*given), request=other))
    cloud.turn()
    assert cloud.actor(0).was_killed
    assert cloud.faults() == ["worker 0 on gpu-0 (10.0.0.1) may not serve: it asks for another key than its own"]
    assert cloud.may_fetch() == (second.raw,)


def test_an_expired_issuer_is_a_fault_and_a_renewed_one_is_used_at_once(cloud: Cloud) -> None:
    make_issuer(cloud.owner.folder, 1, lambda: time.time() - 2 * 86_400)
    cloud.begin()
    assert not cloud.worker(0).is_certified
    assert all("gets no certificate" in fault and "issuer expired" in fault for fault in cloud.faults())
    assert len(cloud.faults()) == 2
    assert cloud.alive() == [0, 1]
    assert names(cloud.worker(0).delivery) == {"worker-1": True}  # its node is enrolled
    make_issuer(cloud.owner.folder, 1)
    cloud.turn(2)
    assert cloud.worker(0).is_certified
    assert cloud.faults() == []


def test_a_malformed_list_of_nodes_ends_nobody(cloud: Cloud) -> None:
    cloud.begin()
    nodes = cloud.owner.folder / "authorized_nodes"
    good = nodes.read_text()
    nodes.write_text("nonsense")
    cloud.turn(2)
    assert cloud.alive() == [0, 1]
    (fault,) = cloud.faults()
    assert "authorized_nodes, line 1" in fault
    assert names(cloud.worker(0).delivery) == {"worker-1": True}
    nodes.write_text(good)
    cloud.turn()
    assert cloud.faults() == []


def test_a_certificate_lasts_its_hours_and_is_renewed_when_its_worker_asks(cloud: Cloud) -> None:
    cloud.begin(hours=2.0)
    first = WorkerCertificate.from_json(cloud.worker(0).delivery.certificate)
    assert abs(first.not_after - time.time() - 7200) < 600
    cloud.now = lambda: time.time() + 60
    cloud.controller._office._now = cloud.now
    cloud.worker(0).renews = True
    cloud.turn()
    cloud.worker(0).renews = False
    cloud.turn()
    second = WorkerCertificate.from_json(cloud.worker(0).delivery.certificate)
    assert second.worker == first.worker
    assert second.not_after > first.not_after


def test_a_renewal_that_its_issuers_end_makes_no_longer_is_not_logged_again(cloud: Cloud, log: Log) -> None:
    """A worker asks in every round then, for as long as the issuer is not renewed."""
    cloud.begin(hours=24 * 30)
    cloud.worker(0).renews = True
    cloud.turn(5)
    issued = [line["worker"] for line in log() if line["event"] == "certificate_issued"]
    assert issued == [0, 1]
    make_issuer(cloud.owner.folder, 9)
    cloud.turn()
    issued = [line["worker"] for line in log() if line["event"] == "certificate_issued"]
    assert issued == [0, 1, 0]
