"""What the controller makes of its workers' reports, without Ray."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.cloud.control.controller import SPREAD_SECONDS, Directory
from isthmus.cloud.directory import Peer, Report, SessionEntry


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def report(
    number: int, sessions: int, *, pid: int = 1, restarts: int = 0, state: str = "serving", address: str = ""
) -> Report:
    address = address or f"h:{number}"
    status: dict[str, Any] = {
        **{"worker": number, "address": address, "span": "2:4", "state": state, "pid": pid},
        **{"model": "tiny", "plan": "2:2", "span_dtype": "fp32", "uptime_s": 3.0 + number},
        "certificate_not_after": 2000 - number,
        **{"sessions": {"alice": sessions} if sessions else {}, "waiting": {"alice": 1}},
        **{"queue_depth": 1, "overdue": 0, "in_flight": 2, "deadlines": {"met": 5, "late": number, "refused": 2}},
        **{"span_bytes": 10, "stash_bytes": 5, "stash_budget_bytes": 50},
        **{"graphs_evicted": 0, "inputs_evicted": 0, "recomputed": 1, "positions": 0.0, "restarts": restarts},
        **{"caches": 1, "cache_bytes": 4, "cache_budget_bytes": 40, "caches_evicted": 0, "caches_lost": 0},
    }
    return Report(
        status,
        Peer(address, state, tuple(SessionEntry("alice", f"link{at}", float(at)) for at in range(sessions))),
    )


def test_restarts_are_counted_and_a_new_controller_asks_for_the_count() -> None:
    directory = Directory(Clock())
    directory.reported(0, report(0, 0, pid=10))
    directory.missed(0)
    assert directory.status()["state"] == "restarting"
    assert directory.status()["deadlines_missed"] == 0.0
    assert directory.status()["workers"][0] == {
        **{"worker": 0, "address": "h:0", "span": "2:4", "state": "restarting", "restarts": 0}
    }
    directory.reported(0, report(0, 0, pid=11))
    assert directory.updates()[0].restarts == 1
    successor = Directory(Clock())
    successor.missed(0)
    assert successor.updates()[0].restarts is None
    successor.reported(0, report(0, 0, pid=11, restarts=1))
    assert successor.status()["restarts"] == 1


def test_each_worker_hears_of_the_others_and_of_those_that_come_back() -> None:
    directory = Directory(Clock())
    for number in range(3):
        directory.reported(number, report(number, 1))
    directory.missed(2)
    updates = directory.updates()
    assert [(peer.address, peer.state) for peer in updates[0].peers] == [("h:1", "serving"), ("h:2", "restarting")]
    assert updates[2].peers == (report(0, 1).peer, report(1, 1).peer)
    directory.gone(1)
    assert [peer.address for peer in directory.updates()[0].peers] == ["h:2"]


def test_edges_do_not_hear_of_a_silent_worker_that_comes_back_elsewhere() -> None:
    for come_back, addresses in ((True, ["h:1"]), (False, [])):
        directory = Directory(Clock(), come_back=come_back)
        for number in range(2):
            directory.reported(number, report(number, 1))
        directory.missed(1)
        assert [peer.address for peer in directory.updates()[0].peers] == addresses
        directory.reported(1, report(1, 1))
        assert [peer.address for peer in directory.updates()[0].peers] == ["h:1"]


def test_a_worker_sheds_sessions_when_the_load_stays_uneven() -> None:
    clock = Clock()
    directory = Directory(clock)
    directory.reported(0, report(0, 4))
    directory.reported(1, report(1, 0))
    assert directory.updates()[0].end_newest == 0
    clock.now += SPREAD_SECONDS
    assert [update.end_newest for update in directory.updates().values()] == [2, 0]
    assert directory.updates()[0].end_newest == 0  # those that move have not arrived yet
    directory.reported(0, report(0, 2))
    directory.reported(1, report(1, 2))
    clock.now += SPREAD_SECONDS
    assert directory.updates()[0].end_newest == 0


@pytest.mark.parametrize(("addresses", "ended"), [(("h:1", "h:2"), [2, 0]), (("balancer:1", "balancer:1"), [0, 0])])
def test_workers_behind_one_address_keep_their_sessions_however_uneven(
    addresses: tuple[str, str], ended: list[int]
) -> None:
    clock = Clock()
    directory = Directory(clock, come_back=False)
    found = [0, 0]
    while clock.now <= SPREAD_SECONDS:
        for number, sessions in ((0, 4), (1, 0)):
            directory.reported(number, report(number, sessions, address=addresses[number]))
        for number, update in directory.updates().items():
            found[number] += update.end_newest
        clock.now += 0.5
    assert found == ended
    assert [peer.address for peer in directory.updates()[0].peers] == [addresses[1]]  # whose sessions count in quotas


def test_workers_of_their_own_addresses_share_evenly_beside_some_behind_one() -> None:
    clock = Clock()
    directory = Directory(clock)
    for number, (sessions, address) in enumerate(((9, "balancer:1"), (0, "balancer:1"), (4, ""), (2, ""))):
        directory.reported(number, report(number, sessions, address=address))
    directory.updates()
    clock.now += SPREAD_SECONDS
    assert [update.end_newest for update in directory.updates().values()] == [0, 0, 1, 0]


def test_the_clouds_status_adds_up_its_workers() -> None:
    directory = Directory(Clock())
    directory.reported(0, report(0, 2))
    directory.reported(1, report(1, 1, restarts=3, state="draining"))
    status = directory.status()
    assert (status["state"], status["model"], status["plan"]) == ("serving", "tiny", "2:2")
    assert (status["sessions"], status["waiting"]) == ({"alice": 3}, {"alice": 2})
    assert (status["queue_depth"], status["in_flight"], status["restarts"]) == (2, 4, 3)
    assert (status["deadlines"], status["deadlines_missed"]) == ({"met": 10, "late": 1, "refused": 4}, 0.3333)
    assert (status["stash_budget_bytes"], status["uptime_s"], status["certificate_not_after"]) == (100, 4.0, 1999)
    assert [worker["state"] for worker in status["workers"]] == ["serving", "draining"]
    assert "positions" not in status["workers"][0]


def test_a_stage_inside_a_pipeline_is_nobodys_peer_and_its_work_counts_once() -> None:
    directory = Directory(Clock())
    directory.reported(0, report(0, 2))
    inner = report(1, 2)
    directory.reported(1, Report(inner.status, None))
    assert directory.updates()[0].peers == ()
    assert directory.updates()[1].peers == ()  # nor has it any: the stage before it is nowhere to go to
    assert list(directory.loads()) == [0]
    status = directory.status()
    assert (status["sessions"], status["in_flight"], status["queue_depth"]) == ({"alice": 2}, 2, 1)
    assert (status["span_bytes"], status["recomputed"]) == (20, 2)
    assert [worker["front"] for worker in status["workers"]] == [True, False]
