"""How many forward states there may be at a time, and whose."""

from __future__ import annotations

import pytest
from support.cloud.manual_scheduler import BACKWARD, FORWARD, Worker, names

from isthmus.cloud.engine.batching import SchedulerLimits

LIMITS = SchedulerLimits(max_wait=0.5, state_bytes=100, smallest=float("inf"))


def holding(**states: int) -> Worker:
    """A worker whose sessions at work hold such forward states."""
    worker = Worker(LIMITS)
    worker.add(*states, kind=FORWARD)
    while batch := worker.begin():
        worker.end(batch, 0.0)
    worker.held = {session.encode(): size for session, size in states.items()}
    return worker


def test_a_forward_waits_while_there_are_many_states_and_a_backward_does_not() -> None:
    worker = holding(a=40, b=40)
    worker.add("c", keeps_bytes=40)
    assert worker.begin() == []
    worker.add("a", kind=BACKWARD)
    batch = worker.begin()
    assert names(batch) == ["a"]
    worker.held = {b"b": 40}
    assert names(worker.begin()) == ["c"]


def test_what_is_being_computed_counts() -> None:
    worker = Worker(LIMITS)
    worker.add("a", "b", keeps_bytes=60)
    assert len(worker.begin()) == 1
    assert worker.begin() == []


@pytest.mark.parametrize(
    ("states", "size"),
    [
        pytest.param({}, 500, id="there are no others"),
        pytest.param({"a": 60}, 40, id="it fits"),
        pytest.param({"flood1": 30, "flood2": 30, "flood3": 30}, 40, id="a tenant holds more than its share"),
    ],
)
def test_a_forward_does_not_wait_where(states: dict[str, int], size: int) -> None:
    worker = holding(**states)
    worker.add("c", keeps_bytes=size)
    assert names(worker.begin()) == ["c"]


def test_a_tenant_s_own_states_count_in_full() -> None:
    worker = holding(flood1=30, flood2=30, flood3=30)
    worker.add("flood4", keeps_bytes=40)
    assert worker.begin() == []


def test_a_session_s_own_state_does_not_bar_its_next_forward() -> None:
    worker = holding(a=100)
    worker.add("a", keeps_bytes=100)
    assert names(worker.begin()) == ["a"]


@pytest.mark.parametrize("silent", [True, False])
def test_no_wait_is_longer_than_max_wait_and_silent_sessions_keep_nobody_waiting(silent: bool) -> None:
    worker = holding(a=100)
    worker.now += 0.6 if silent else 0.0
    since = worker.now
    worker.add("c", keeps_bytes=40)
    while not worker.begin():
        worker.pass_time()
    assert worker.now - since == pytest.approx(0.0 if silent else 0.5, abs=0.06)
