"""Several batches at a time: what runs beside what, and who waits for room in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from support.cloud.manual_scheduler import BACKWARD, Together

from isthmus.cloud.engine.expected_sessions import THINK_SECONDS
from isthmus.cloud.engine.requests import Batching, Job, Kind
from isthmus.cloud.engine.scheduler import RETHINK_SECONDS, Scheduler

OPENING = Kind("open", "close", opens=True, anywhere=True)
CLOSING = Kind("close", "open", closes=True, anywhere=True)
BESIDE = Kind("forward", "forward", anywhere=True)


@dataclass
class Lanes(Together):
    """A worker with lanes, and memory for so many token positions; what begins ends when it is told."""

    room: float = 60.0
    lanes: int = 2

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(lambda: self.now, self.batching, lambda: self.room, self.lanes)

    def begin(self, **options: bool) -> list[Job[str]]:
        return self.scheduler.next(**options)

    def end(self, batch: list[Job[str]], seconds: float = 0.1) -> None:
        self.now += seconds
        self.scheduler.finished(batch, seconds)


def names(batch: list[Job[str]]) -> list[str]:
    return sorted(job.work for job in batch)


def test_of_a_session_one_piece_runs_at_a_time() -> None:
    worker = Lanes()
    worker.add("a")
    worker.add("a", BACKWARD)
    batch = worker.begin()
    assert names(batch) == ["a"]
    assert worker.begin() == []
    assert worker.scheduler.ready_at() is None  # until something ends
    worker.end(batch)
    assert names(worker.begin()) == ["a"]


def test_the_other_lanes_take_only_what_may_be_done_beside_anything() -> None:
    worker = Lanes()
    worker.add("a", None)
    worker.add("b", OPENING)
    assert names(worker.begin(anywhere=True)) == ["b"]
    assert worker.begin(anywhere=True) == []
    assert names(worker.begin()) == ["a"]


def test_opening_waits_for_closing_where_there_is_no_room_but_not_for_ever() -> None:
    worker = Lanes(batching=Batching(positions=100, smallest=5, window=0.5, open_calls=2))
    for session in ("a", "b", "c"):
        worker.add(session, OPENING, positions=30)
    first, second = worker.begin(), worker.begin()
    assert names(first + second) == ["a", "b"]  # a lane's part, of three, is less than two have
    assert worker.begin() == []  # 60 are open
    worker.end(first)
    worker.end(second)
    assert worker.begin() == []  # a and b will close soon
    for session in ("a", "b"):
        worker.add(session, CLOSING, positions=30)
    assert names(worker.begin()) == ["a"]
    assert names(worker.begin()) == ["c"]  # opens as a closes
    assert names(worker.begin()) == ["b"]

    patient = Lanes(batching=Batching(positions=100, smallest=5, window=0.5, open_calls=2))
    for session in ("a", "b"):
        patient.add(session, OPENING, positions=30)
    for batch in (patient.begin(), patient.begin()):
        patient.end(batch)
    patient.add("c", OPENING, positions=30)
    assert patient.begin() == []
    patient.now += THINK_SECONDS + 0.01  # nobody knows a and b, which are not expected any more
    assert names(patient.begin()) == ["c"]


@pytest.mark.parametrize(
    ("room", "together"),
    [
        pytest.param(200.0, 4, id="an even part for each lane"),
        pytest.param(60.0, 3, id="so many that each, with its slack, has room"),
        pytest.param(20.0, 1, id="room for little"),
        pytest.param(0.0, 1, id="no room"),
    ],
)
def test_a_batch_has_an_even_part_where_a_lanes_part_has_no_room(room: float, together: int) -> None:
    worker = Lanes(room=room, batching=Batching(positions=1000, smallest=5, window=0.5, open_calls=2))
    for session in "abcdefgh":
        worker.add(session, OPENING, positions=15)
    assert len(worker.begin()) == together


def test_what_is_being_closed_counts_until_all_close_that_was_opened_together() -> None:
    worker = Lanes(batching=Batching(positions=100, smallest=5, window=2.0, open_calls=2), lanes=1)
    for session in ("a", "b"):
        worker.add(session, OPENING, positions=30)
    both = worker.begin()
    assert names(both) == ["a", "b"]
    worker.end(both)
    worker.now += THINK_SECONDS + 0.01  # b is overdue
    worker.add("a", CLOSING, positions=30)
    assert names(worker.begin()) == ["a"]
    worker.add("c", OPENING, positions=30)
    assert worker.begin() == []  # what a and b share stays
    worker.add("b", CLOSING, positions=30)
    assert [names(worker.begin()) for _ in range(2)] == [["b"], ["c"]]


def holding(*sessions: str) -> Lanes:
    """A worker whose whole room these sessions have taken, which close what they have opened after two seconds."""
    worker = Lanes(batching=Batching(positions=100, smallest=5, window=0.5, open_calls=2))
    for kind in (OPENING, CLOSING, OPENING):
        for session in sessions:
            worker.add(session, kind, positions=30)
        batches = [worker.begin() for _ in sessions]
        assert sorted(name for batch in batches for name in names(batch)) == [*sessions]
        worker.now += 1.0
        for batch in batches:
            worker.scheduler.finished(batch, 1.0)
        worker.now += 2.0
    worker.now -= 2.0
    return worker


@pytest.mark.parametrize(
    ("sessions", "deadline", "seconds"),
    [
        pytest.param(("a", "b"), None, 6.0, id="until the others are overdue, whatever the window"),
        pytest.param(("a", "b"), 7.0, 3.0, id="half of what the deadline leaves"),
        pytest.param(("a", "b"), 3.5, 0.0, id="not where nobody closes in time"),
        pytest.param(("a1", "a2"), None, 0.0, id="not for what a tenant has beyond its share"),
    ],
)
def test_who_wants_room_waits(sessions: tuple[str, ...], deadline: float | None, seconds: float) -> None:
    worker = holding(*sessions)
    since = worker.now
    worker.add("newcomer", OPENING, positions=30, deadline=deadline)
    while not (batch := worker.begin()):
        assert worker.scheduler.overdue() == 0, "it waits for room, and not because there is too much work"
        ready = worker.scheduler.ready_at()
        assert ready is not None
        worker.now = ready + 1e-3
        assert worker.now < since + 10
    assert names(batch) == ["newcomer"]
    assert worker.now - since == pytest.approx(seconds, abs=2 * RETHINK_SECONDS)


@pytest.mark.parametrize("deadline", [5.01, 5.5, 6.43, 7.77])
def test_who_waits_for_room_keeps_the_deadline(deadline: float) -> None:
    worker = holding("a", "b")
    worker.add("newcomer", OPENING, positions=30, deadline=deadline)
    while not (batch := worker.begin()):
        assert worker.scheduler.take_late() == []
        ready = worker.scheduler.ready_at()
        assert ready is not None
        worker.now = ready + 1e-3
    assert names(batch) == ["newcomer"]


def test_nobody_waits_for_the_room_of_a_session_that_is_silent() -> None:
    worker = holding("a", "b")
    worker.now += 10
    for session in ("c", "d", "e"):
        worker.add(session, OPENING, positions=30)
    assert [names(worker.begin()) for _ in range(2)] == [["c"], ["d"]]
    assert worker.begin() == []


def test_what_was_opened_together_closes_together() -> None:
    worker = Lanes(room=1000.0)
    for session in ("a", "b", "c", "d"):
        worker.add(session, OPENING)
    batches = [worker.begin(), worker.begin()]
    assert [names(batch) for batch in batches] == [["a", "b"], ["c", "d"]]
    for batch in batches:
        worker.end(batch, 0.01)
    for session in ("a", "c", "d"):
        worker.add(session, CLOSING)
    assert names(worker.begin()) == ["c", "d"]  # a waits for b, which it shares a graph with
    for session in (b"c", b"d"):
        worker.scheduler.cancel(session)
    worker.add("b", CLOSING)
    assert names(worker.begin()) == ["a", "b"]  # also where a lane's part is one of them


def test_batches_leave_each_lane_its_part() -> None:
    worker = Lanes(room=1000.0)
    for session in ("a", "b", "c", "d"):
        worker.add(session, OPENING)
    worker.add("e", OPENING, positions=20)
    assert [names(worker.begin()) for _ in range(2)] == [["a", "b", "c"], ["d", "e"]]  # 30 each, and 15 % more


def test_where_there_is_a_lane_for_each_nobody_waits_for_company() -> None:
    worker = Lanes(room=1000.0)
    for session in ("a", "b"):
        worker.add(session, OPENING)
    batches = [worker.begin(), worker.begin()]
    assert [names(batch) for batch in batches] == [["a"], ["b"]]
    for batch in batches:
        worker.end(batch, 0.1)
    worker.add("a", CLOSING)
    assert names(worker.begin()) == ["a"]  # b comes soon


def test_a_tenant_with_several_sessions_has_its_share_of_the_time_and_of_the_room() -> None:
    worker = Lanes(room=100.0)
    worker.add("first", OPENING)
    worker.end(worker.begin())  # ten positions take 0.1 s
    worker.scheduler.cancel(b"first")
    for tenant in ("a", "b", "c"):
        worker.add(tenant, OPENING)
    for session in range(5):
        worker.add(f"flood{session}", OPENING)
    for seconds, more in ((0.2, True), (0.02, False)):
        batches = [worker.begin(), worker.begin()]
        # What else waits of the flood makes no part larger, and its rest does not keep it from closing.
        assert [names(batch) for batch in batches] == [["a", "b"], ["c", "flood0"]]
        worker.now += seconds
        for batch in batches:
            worker.scheduler.finished(batch, seconds)
        for session in ("a", "b", "c", "flood0") if more else ():
            worker.add(session, CLOSING)
    assert worker.begin() == []  # with half of a lane's time as its share, the flood rests for as long as it has taken
    ready = worker.scheduler.ready_at()
    assert ready is not None
    assert ready == pytest.approx(worker.now - 0.02 + 0.1 + 0.01)
    worker.now = ready + 1e-9
    assert len(worker.begin()) == 1


def test_who_rests_is_there_for_somebody_who_waits() -> None:
    worker = Lanes(room=1000.0)
    for session in ("a", "b", "c", "flood1", "flood2"):
        worker.add(session, OPENING)
    while batch := worker.begin():
        worker.end(batch, 0.1)
    assert [*worker.scheduler.waiting()] == ["flood"]  # flood2 rests
    worker.add("flood3", CLOSING)
    assert worker.begin() == []  # so does flood3, which has opened nothing: it replays
    for session in ("a", "b", "c", "flood1"):
        worker.add(session, CLOSING)
    batches = [worker.begin(), worker.begin()]
    assert "flood1" in {name for batch in batches for name in names(batch)}
    for batch in batches:
        worker.end(batch, 0.1)
    worker.add("flood4", OPENING, interactive=True)
    assert names(worker.begin()) == ["flood4"]


def test_what_was_opened_together_closes_together_whoever_is_ahead() -> None:
    worker = Lanes(room=1000.0)
    for session in ("a1", "b1", "c1", "a2", "b2", "c2"):
        worker.add(session, OPENING)
    batches = []
    while batch := worker.begin():
        batches.append(names(batch))
        worker.end(batch, 0.01)
    twice, together = next((t, each) for each in batches for t in "abc" if {f"{t}1", f"{t}2"} <= set(each))
    worker.add(f"{twice}3", None)
    batch = worker.begin()
    for session in together:
        worker.add(session, CLOSING)
    worker.end(batch, 1.0)  # now this tenant is ahead
    assert names(worker.begin()) == together


def test_what_failed_has_opened_nothing_and_what_was_beside_it_has() -> None:
    worker = Lanes(room=40.0, batching=Batching(positions=100, smallest=5, window=0.5, open_calls=2))
    for session, positions in (("a", 13), ("b", 13), ("c", 20), ("d", 20)):
        worker.add(session, OPENING, positions=positions)
    batch = worker.begin()
    assert names(batch) == ["a", "b"]
    worker.now += 0.1
    worker.scheduler.finished(batch, 0.1, [job for job in batch if job.work == "b"])
    assert names(worker.begin()) == ["c"]  # 13 are open
    assert worker.begin() == []  # 33 are


@pytest.mark.parametrize("why", ["failed", "gone while it was computed"])
def test_nobody_waits_for_who_shares_nothing_after_all(why: str) -> None:
    worker = Lanes(batching=Batching(positions=100, smallest=5, window=2.0), lanes=1)
    for session in ("a", "b"):
        worker.add(session, OPENING)
    batch = worker.begin()
    assert names(batch) == ["a", "b"]
    if why != "failed":
        worker.scheduler.cancel(b"b")
    worker.now += 0.1
    worker.scheduler.finished(batch, 0.1, [job for job in batch if job.work == "b" and why == "failed"])
    assert worker.scheduler.crowded == (why == "failed")  # b may try again
    worker.add("a", CLOSING)
    assert names(worker.begin()) == ["a"]


def test_one_session_at_work_is_no_crowd() -> None:
    worker = Lanes()
    assert not worker.scheduler.crowded
    worker.add("a", OPENING)
    assert not worker.scheduler.crowded
    worker.add("b", OPENING)
    assert worker.scheduler.crowded
    worker.end(worker.begin())
    assert worker.scheduler.crowded  # both will be back
    worker.now += 10
    assert not worker.scheduler.crowded


# Memory of what is computed at a time ---------------------------------------------------------------------------------


def within(memory: float) -> Lanes:
    worker = Lanes()
    worker.scheduler = Scheduler(lambda: worker.now, worker.batching, lambda: worker.room, 2, memory)
    return worker


def test_what_does_not_fit_beside_what_runs_waits_for_it() -> None:
    worker = within(100)
    for name in ("a", "b", "c", "d"):
        worker.add(name, BESIDE, positions=10, nbytes=60)
    first = worker.begin()
    assert len(first) == 1, "two may share a pass, and do not fit together"
    assert worker.begin(anywhere=True) == []
    worker.end(first, seconds=1.0)
    assert len(worker.begin(anywhere=True)) == 1


def test_without_a_budget_they_share_a_pass() -> None:
    worker = within(math.inf)
    for name in ("a", "b", "c", "d"):
        worker.add(name, BESIDE, positions=10, nbytes=60)
    assert len(worker.begin()) == 2
    assert len(worker.begin(anywhere=True)) == 2


def test_small_pieces_do_not_keep_a_large_one_out() -> None:
    worker = within(100)
    worker.add("a", BESIDE, positions=10, nbytes=60)
    running = worker.begin()
    worker.add("large", BESIDE, positions=10, nbytes=90)
    worker.now += 0.01
    worker.add("small", BACKWARD, positions=10, nbytes=10)  # would fit beside the first
    assert worker.begin() == []
    worker.end(running)
    assert names(worker.begin()) == ["large"]


def test_a_lane_leaves_room_for_what_only_the_first_may_take() -> None:
    worker = within(100)
    worker.add("sited", None, positions=10, nbytes=90)
    worker.add("small", BESIDE, positions=10, nbytes=20)
    worker.scheduler._accounts["small"].used = -1.0  # whose turn it is in the lane beside
    worker.scheduler._present = worker.scheduler._accounts["sited"].used = -2.0
    assert worker.begin(anywhere=True) == []
    assert names(worker.begin()) == ["sited"]
    assert worker.begin(anywhere=True) == []


@pytest.mark.parametrize(("sited", "together"), [(60, 1), (40, 2)])
def test_a_batch_in_the_lane_beside_leaves_that_room_as_well(sited: int, together: int) -> None:
    worker = within(100)
    worker.add("sited", None, positions=10, nbytes=sited)
    for name in ("a", "b", "c", "d"):
        worker.add(name, BESIDE, positions=10, nbytes=30)
    assert len(worker.begin(anywhere=True)) == together
    assert names(worker.begin()) == ["sited"]


def test_what_is_larger_than_the_budget_runs_alone() -> None:
    worker = within(100)
    worker.add("a", BESIDE, positions=10, nbytes=500)
    batch = worker.begin()
    assert names(batch) == ["a"]
    worker.add("b", BESIDE, positions=10, nbytes=1)
    assert worker.begin() == []
