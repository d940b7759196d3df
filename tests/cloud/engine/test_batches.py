"""What shares a batch, how long it waits for partners, and deadlines."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, strategies as st
from support.cloud.manual_scheduler import BACKWARD, FORWARD, Worker, names, request

from isthmus.cloud.engine.batching import SchedulerLimits
from isthmus.cloud.engine.requests import Kind, Request, Share


def worker_with(**limits: float) -> Worker:
    values = {"max_batch_tokens": 100, "smallest": 5, "max_wait": 0.5, **limits}
    return Worker(SchedulerLimits(**values))  # type: ignore[arg-type]  # whole numbers where they have to be


def test_requests_of_one_kind_share_a_batch() -> None:
    worker = worker_with()
    worker.add("a", "b", "c")
    worker.add("d", kind=BACKWARD)
    worker.add("e", kind=None)
    worker.add("f", positions=4)  # too small
    batches = [worker.turn() for _ in range(4)]
    assert sorted(batches) == [["a", "b", "c"], ["d"], ["e"], ["f"]]


def test_with_no_smallest_size_every_request_is_alone() -> None:
    worker = worker_with(smallest=float("inf"))
    worker.add("a", "b")
    assert [worker.turn(), worker.turn()] == [["a"], ["b"]]


def test_a_batch_is_bounded_by_its_positions() -> None:
    worker = worker_with()
    for session, positions in (("a", 60), ("b", 50), ("c", 40), ("d", 200)):
        worker.add(session, positions=positions)
    assert [worker.turn() for _ in range(3)] == [["a", "c"], ["b"], ["d"]]


@pytest.mark.parametrize(("threads", "together"), [(1, ["a", "b", "c", "d"]), (2, ["a", "b"]), (4, ["a"])])
def test_a_batch_has_an_even_part_for_each_compute_thread(threads: int, together: list[str]) -> None:
    worker = worker_with(compute_threads=threads)
    worker.add("a", "b", "c", "d")
    assert names(worker.begin()) == together


def test_where_there_is_a_thread_for_each_nobody_waits_for_partners() -> None:
    worker = worker_with(compute_threads=2)
    for kind in (FORWARD, BACKWARD, FORWARD):
        worker.add("a", "b", kind=kind)
        for batch in (worker.begin(), worker.begin()):
            assert len(batch) == 1
            worker.end(batch, 0.1)
    worker.add("a", kind=BACKWARD)
    assert names(worker.begin()) == ["a"]


def test_a_sessions_requests_are_never_in_one_batch() -> None:
    worker = worker_with()
    worker.add("a", "a", "a1")
    assert [worker.turn(), worker.turn()] == [["a", "a1"], ["a"]]


def test_interactive_requests_and_training_do_not_share_a_batch() -> None:
    worker = worker_with()
    worker.add("a")
    worker.add("b", "c", interactive=True)
    assert [worker.turn(), worker.turn()] == [["b", "c"], ["a"]]


def test_a_tenant_that_floods_adds_no_more_than_its_share() -> None:
    worker = worker_with(max_batch_tokens=1000)
    worker.add("x")
    worker.turn()  # the speed of a position is known
    worker.scheduler.cancel(b"x")
    worker.add(*(f"flood{number}" for number in range(10)))
    worker.add("a", "b", "c")
    first = Counter(name.rstrip("0123456789") for name in worker.turn())
    assert first == {"flood": 2, "a": 1, "b": 1, "c": 1}, "a second one while it is ahead of nobody"


def test_a_tenant_alone_has_its_sessions_in_one_batch() -> None:
    worker = worker_with()
    worker.add("a0", "a1", "a2", "a3")
    assert len(worker.turn()) == 4


def test_the_time_of_a_batch_is_charged_by_positions() -> None:
    worker = worker_with()
    worker.add("a", positions=30)
    worker.add("b", positions=10)
    worker.turn(0.1)
    assert worker.virtual_times() == pytest.approx({"a": 3.0, "b": 1.0})


def test_a_limited_tenant_joins_no_batch_while_its_budget_is_overdrawn() -> None:
    worker = worker_with()
    limited = Share(1.0, 10.0)
    worker.add("limited1", positions=50, share=limited)
    worker.turn(0.001)
    worker.add("limited2", positions=50, share=limited)
    worker.add("a")
    assert worker.turn(0.001) == ["a"]
    while not (done := worker.turn(0.001)):
        worker.pass_time()
    assert done == ["limited2"]


# Waiting for partners -------------------------------------------------------------------------------------------------


def in_step(worker: Worker, *sessions: str, away: float = 0.1) -> None:
    """Sessions that have come back twice, so long after their answers, and were answered just now."""
    for kind in (FORWARD, BACKWARD, FORWARD):
        worker.now += away
        worker.add(*sessions, kind=kind)
        assert worker.turn() == sorted(sessions)


def test_a_batch_waits_for_sessions_that_are_expected_back() -> None:
    worker = worker_with()
    in_step(worker, "a", "b")
    since = worker.now
    worker.add("a", kind=BACKWARD)
    assert worker.turn() == []
    worker.add("b", kind=BACKWARD)
    assert worker.turn() == ["a", "b"]
    assert worker.now - since == pytest.approx(20 * 0.01)


@pytest.mark.parametrize(
    ("max_wait", "away", "waits"),
    [
        pytest.param(0.5, 0.4, 0.2, id="as long as the batch with them takes"),
        pytest.param(0.15, 0.1, 0.15, id="max_wait"),
        pytest.param(0.5, 0.05, 0.1, id="until they are away for twice as long as the last time"),
        pytest.param(0.0, 0.1, 0.0, id="not at all"),
    ],
)
def test_the_wait_has_an_end(max_wait: float, away: float, waits: float) -> None:
    worker = worker_with(max_wait=max_wait)
    for kind in (FORWARD, BACKWARD, FORWARD):
        worker.now += away
        worker.add("a", "b", kind=kind)
        worker.turn()
        while len(worker.scheduler):
            worker.turn()
    since = worker.now
    worker.add("a", kind=BACKWARD)
    while not (batch := worker.begin()):
        worker.pass_time()
    assert names(batch) == ["a"]
    assert worker.now - since == pytest.approx(waits, abs=0.06)


@pytest.mark.parametrize("why", ["gone", "interactive", "full", "new", "busy elsewhere"])
def test_nobody_waits_in_vain(why: str) -> None:
    worker = worker_with()
    if why == "new":
        worker.add("a", "b")
        worker.turn()
    else:
        in_step(worker, "a", "b")
    if why == "gone":
        worker.scheduler.cancel(b"b")
    if why == "busy elsewhere":
        worker.add("b2", kind=None)
        assert names(worker.begin()) == ["b2"]
    worker.add("a", kind=BACKWARD, interactive=why == "interactive", positions=95 if why == "full" else 10)
    assert worker.turn() == ["a"]


def test_while_one_kind_waits_for_partners_another_is_computed() -> None:
    worker = worker_with()
    in_step(worker, "a", "b")
    worker.add("a", kind=BACKWARD)
    worker.add("c", kind=None)
    assert worker.turn() == ["c"]


# Deadlines ------------------------------------------------------------------------------------------------------------


def paced(per_position: float = 0.1) -> Worker:
    """A worker that knows how long a position takes."""
    worker = worker_with(max_wait=0.0)
    worker.add("a")
    worker.turn(per_position)
    return worker


def test_a_request_whose_deadline_has_passed_is_refused_and_never_begun() -> None:
    worker = paced()
    worker.add("b", deadline=1.0)
    worker.now += 1.0
    assert worker.scheduler.take_late() == []
    worker.now += 0.01
    assert worker.turn() == []
    assert names(worker.scheduler.take_late()) == ["b"]
    assert worker.scheduler.take_late() == []


def test_a_batch_takes_nobody_along_who_would_make_a_deadline_be_missed() -> None:
    worker = paced(0.1)  # ten positions take a second
    worker.add("b", deadline=1.5)
    worker.add("c")
    assert [worker.turn(0.1), worker.turn(0.1)] == [["b"], ["c"]]
    worker.add("b", deadline=2.5)
    worker.add("c")
    assert worker.turn(0.1) == ["b", "c"]


def test_the_pace_is_the_tenant_s_own_and_what_computed_nothing_says_nothing_of_it() -> None:
    worker = paced(0.1)
    worker.add("quick")
    worker.turn(0.001)
    worker.add("a")
    worker.turn(0.00001, computed=False)  # refused
    for partner, together in (("quick", 2), ("a", 1)):
        worker.add("new", deadline=0.5)  # at the quickest's speed as long as nothing is known of its own
        worker.add(partner)
        assert len(worker.begin()) == together
        worker = paced(0.1)
        worker.add("quick")
        worker.turn(0.001)


def test_a_wait_for_partners_keeps_the_deadline() -> None:
    worker = worker_with()
    in_step(worker, "a", "b")
    worker.add("a", kind=BACKWARD, deadline=0.2)  # it takes 0.1
    while not (batch := worker.begin()):
        worker.pass_time()
        assert worker.scheduler.take_late() == []
    worker.end(batch, 0.1)
    assert batch[0].deadline is not None
    assert worker.now <= batch[0].deadline + 1e-3


def test_a_request_that_waits_for_its_rate_is_refused_in_time() -> None:
    worker = worker_with(max_wait=0.0)
    limited = Share(1.0, 1.0)
    worker.add("limited1", positions=50, share=limited)
    worker.turn(0.01)
    worker.add("limited2", positions=50, share=limited, deadline=5.0)
    since = worker.now
    while not (late := worker.scheduler.take_late()):
        assert worker.turn() == []
        worker.pass_time()
    assert names(late) == ["limited2"]
    assert worker.now - since == pytest.approx(5.0, abs=0.06)


# In general -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c"]),
            st.integers(0, 3),
            st.sampled_from([FORWARD, BACKWARD, None]),
            st.integers(0, 60),
        ),
        min_size=1,
        max_size=60,
    )
)
def test_everything_is_done_once_in_the_order_of_its_session(asked: list[tuple[str, int, Kind | None, int]]) -> None:
    worker = worker_with()
    expected: dict[bytes, list[Request[str]]] = {}
    for tenant, session, kind, positions in asked:
        each = request(f"{tenant}{session}", positions, kind)
        expected.setdefault(each.session, []).append(each)
        worker.scheduler.add(each)
    done: dict[bytes, list[Request[str]]] = {}
    while len(worker.scheduler):
        batch = worker.begin()
        if not batch:
            worker.pass_time()
            continue
        assert len({each.session for each in batch}) == len(batch)
        assert len(batch) == 1 or sum(each.positions for each in batch) <= 100
        for each in batch:
            done.setdefault(each.session, []).append(each)
        worker.end(batch, 0.1)
    assert done == expected


# Memory of forward states ---------------------------------------------------------------------------------------------

FEW_STATES = SchedulerLimits(max_wait=0.5, state_bytes=100, smallest=float("inf"))


def holding(**states: int) -> Worker:
    """A worker whose sessions at work hold such forward states."""
    worker = Worker(FEW_STATES)
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
    worker = Worker(FEW_STATES)
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
