"""What follows from the reports of a cloud's workers, without Ray."""

from __future__ import annotations

import pytest

from isthmus.cloud.directory import (
    Peer,
    Rate,
    SessionEntry,
    less_loaded,
    newer_elsewhere,
    ranks,
    sessions_elsewhere,
    surplus,
)


def sessions_of(count: int, tenant: str = "alice") -> tuple[SessionEntry, ...]:
    return tuple(SessionEntry(tenant, f"link{number}", float(number)) for number in range(count))


def test_a_newcomer_goes_where_there_are_fewer_sessions() -> None:
    peers = [Peer("b:1", "serving", sessions_of(2)), Peer("c:1", "serving", sessions_of(1)), Peer("d:1", "draining")]
    assert less_loaded(2, peers, {}) == "c:1"
    assert less_loaded(1, peers, {}) is None
    assert less_loaded(2, peers, {"c:1": 1}) is None  # one is on its way there
    assert less_loaded(3, peers, {"c:1": 2}) == "b:1"
    assert less_loaded(9, [Peer("d:1", "draining"), Peer("e:1", "restarting")], {}) is None


def test_a_tenants_sessions_elsewhere_count_but_not_the_link_that_moves() -> None:
    peers = [Peer("b:1", "serving", sessions_of(2)), Peer("c:1", "draining", sessions_of(1, "bob"))]
    assert sessions_elsewhere("alice", "link9", peers) == 2
    assert sessions_elsewhere("alice", "link1", peers) == 1
    assert sessions_elsewhere("carol", "link1", peers) == 0


def test_a_session_whose_link_was_opened_anew_elsewhere_is_over() -> None:
    peers = [Peer("b:1", "serving", (SessionEntry("alice", "x", 5.0),))]
    assert newer_elsewhere(SessionEntry("alice", "x", 4.0), peers)
    assert not newer_elsewhere(SessionEntry("alice", "x", 6.0), peers)  # that one is the old one
    assert not newer_elsewhere(SessionEntry("bob", "x", 4.0), peers)


def test_a_tenants_links_are_ranked_by_age_and_one_that_has_moved_counts_once() -> None:
    moved = (SessionEntry("alice", "x", 1.0), SessionEntry("alice", "x", 9.0))
    others = (SessionEntry("alice", "z", 5.0), SessionEntry("alice", "y", 5.0), SessionEntry("bob", "x", 7.0))
    expected = {("alice", "y"): 0, ("alice", "z"): 1, ("alice", "x"): 2, ("bob", "x"): 0}
    assert ranks((*moved, *others)) == ranks((*others, *moved[::-1])) == expected
    assert ranks(()) == {}


@pytest.mark.parametrize(
    ("sessions", "move"),
    [({}, None), ({0: 3}, None), ({0: 1, 1: 0}, None), ({0: 2, 1: 0}, (0, 1)), ({0: 1, 1: 6, 2: 2}, (1, 2))],
)
def test_sessions_are_spread_evenly(sessions: dict[int, int], move: tuple[int, int] | None) -> None:
    assert surplus(sessions) == move


def test_a_rate_is_that_of_its_window_and_begins_anew_with_the_counter() -> None:
    rate = Rate(5.0)
    assert rate.add(0.0, 100.0) == 0.0
    assert rate.add(2.0, 300.0) == 100.0
    assert [rate.add(float(now), 300.0) for now in range(3, 11)][-1] == 0.0
    assert rate.add(11.0, 7.0) == 0.0
    assert rate.add(12.0, 57.0) == 50.0
