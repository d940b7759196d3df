"""The order of several tenants' work, with a clock that stands still unless it is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, strategies as st

from isthmus.cloud.attendance import THINK_SECONDS
from isthmus.cloud.scheduler import LEAD_SECONDS, RETHINK_SECONDS, Batching, Job, Kind, Scheduler, Share

EQUAL = Share()


@dataclass
class Worker:
    """A scheduler, its clock, and one worker that does what it is given."""

    now: float = 0.0
    scheduler: Scheduler[str] = field(init=False)
    done: list[Job[str]] = field(default_factory=list)
    seconds: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(lambda: self.now)

    def add(
        self, tenant: str, work: str = "", *, share: Share = EQUAL, interactive: bool = False, positions: int = 0
    ) -> None:
        self.scheduler.add(
            work, tenant=tenant, owner=work.encode(), share=share, interactive=interactive, positions=positions
        )

    def turn(self, seconds: float = 1.0) -> str | None:
        """Do the next piece, which takes so long; returns whose it was."""
        batch = self.scheduler.next()
        if not batch:
            return None
        (job,) = batch
        self.now += seconds
        self.scheduler.finished(batch, seconds)
        self.seconds[job.tenant] += seconds
        self.done.append(job)
        return job.tenant

    def turns(self, count: int, seconds: float = 1.0) -> list[str | None]:
        return [self.turn(seconds) for _ in range(count)]


def jain(shares: Iterable[float]) -> float:
    """Jain's index of fairness: 1 where all are equal, 1/n where one has everything."""
    values = list(shares)
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def test_nothing_waits() -> None:
    worker = Worker()
    assert worker.scheduler.next() == []
    assert worker.scheduler.ready_at() is None
    assert len(worker.scheduler) == 0


def test_equal_tenants_take_turns_whatever_the_length_of_their_queues() -> None:
    worker = Worker()
    for _ in range(20):
        worker.add("flood")
    for tenant in ("a", "b"):
        worker.add(tenant)
        worker.add(tenant)
    assert Counter(worker.turns(6)) == {"flood": 2, "a": 2, "b": 2}
    assert worker.turns(3) == ["flood"] * 3


def test_shares_are_of_time_and_not_of_pieces() -> None:
    worker = Worker()
    for _ in range(100):
        worker.add("long")
        worker.add("short")
    while worker.scheduler.waiting().keys() == {"long", "short"}:
        worker.turn(5.0 if worker.scheduler.used()["long"] <= worker.scheduler.used()["short"] else 1.0)
    assert jain(worker.seconds.values()) > 0.99


def test_weights_are_shares() -> None:
    worker = Worker()
    for _ in range(100):
        worker.add("heavy", share=Share(3.0))
        worker.add("light")
    worker.turns(80)
    assert worker.seconds["heavy"] == pytest.approx(60, abs=3)


def test_who_comes_late_neither_catches_up_nor_waits_for_the_others_to_catch_up() -> None:
    worker = Worker()
    for _ in range(60):
        worker.add("early")
    worker.turns(30)
    for _ in range(30):
        worker.add("late")
    assert Counter(worker.turns(20)) == {"early": 10, "late": 10}


def test_who_had_the_worker_to_itself_owes_nothing() -> None:
    worker = Worker()
    for _ in range(50):
        worker.add("first")
    worker.turns(50)
    for _ in range(10):
        worker.add("second")
        worker.add("first")
    assert Counter(worker.turns(10)) == {"first": 5, "second": 5}


def test_a_tenant_that_comes_and_goes_has_its_turn_next() -> None:
    worker = Worker()
    for _ in range(50):
        worker.add("flood")
    worker.turns(5)
    for _ in range(10):
        worker.add("now and then")
        first = worker.turns(2)
        assert "now and then" in first
        worker.turns(2)


def test_interactive_work_comes_first_and_is_charged() -> None:
    worker = Worker()
    for _ in range(40):
        worker.add("training")
        worker.add("chat", interactive=True)
    order = worker.turns(40)
    lead = int(LEAD_SECONDS) + 1
    assert order[:lead] == ["chat"] * lead
    assert Counter(order)["chat"] <= 20 + lead  # no more than its share, and what it may be ahead


def test_a_tenants_own_interactive_work_comes_first_and_each_kind_keeps_its_order() -> None:
    worker = Worker()
    for work in ("t1", "t2"):
        worker.add("a", work)
    for work in ("i1", "i2"):
        worker.add("a", work, interactive=True)
    worker.turns(4)
    assert [job.work for job in worker.done] == ["i1", "i2", "t1", "t2"]


def test_a_limited_tenant_is_held_to_its_rate() -> None:
    worker = Worker()
    for _ in range(100):
        worker.add("limited", share=Share(1.0, 100.0), positions=50)
    while worker.now < 20:
        if worker.turn(0.01) is None:
            ready = worker.scheduler.ready_at()
            assert ready is not None
            assert ready > worker.now
            worker.now = ready
    assert len(worker.done) * 50 == pytest.approx(20 * 100 + 100, abs=100)


def test_a_limited_tenant_leaves_the_worker_to_others_and_what_has_begun_goes_on() -> None:
    worker = Worker()
    limited = Share(1.0, 10.0)
    worker.add("limited", "begins", share=limited, positions=1000)
    worker.add("limited", "waits", share=limited, positions=1)
    worker.add("limited", "goes on", share=limited)
    worker.add("other", "other", positions=1000)
    while worker.turn(0.1) is not None:
        pass
    assert {job.work for job in worker.done} == {"begins", "goes on", "other"}
    assert worker.scheduler.waiting() == {"limited": 1}


def test_what_continues_counts_once_against_the_limit_and_is_charged_its_time() -> None:
    worker = Worker()
    limited = Share(1.0, 10.0)
    for continues in (False, True, True):
        worker.scheduler.add("step", tenant="limited", owner=b"s", share=limited, positions=40, continues=continues)
    assert worker.turns(3, 0.1) == ["limited"] * 3
    assert worker.scheduler.used()["limited"] == pytest.approx(0.3)
    worker.add("limited", "new", share=limited, positions=1)
    assert worker.turn() is None
    ready = worker.scheduler.ready_at()
    assert ready is not None
    assert ready <= worker.now + 4.0  # forty less the ten of the first second, at ten a second


def test_a_limit_that_comes_later_counts_from_then_on() -> None:
    worker = Worker()
    worker.add("a", "before", positions=1_000_000)
    worker.turn(0.1)
    worker.add("a", "after", share=Share(1.0, 10.0), positions=1)
    assert worker.turn(0.1) == "a"


def test_what_is_cancelled_has_no_turn() -> None:
    worker = Worker()
    for tenant, owner in (("a", "x"), ("a", "y"), ("b", "x")):
        worker.add(tenant, owner)
    assert [job.tenant for job in worker.scheduler.cancel(b"x")] == ["a", "b"]
    assert worker.turns(2) == ["a", None]
    worker.add("a", "z")
    assert [job.work for job in worker.scheduler.clear()] == ["z"]
    assert len(worker.scheduler) == 0


TENANTS = st.sampled_from(["a", "b", "c"])
PIECES = st.lists(st.tuples(TENANTS, st.booleans(), st.integers(0, 50), st.floats(0.01, 3.0)), min_size=1, max_size=60)


@given(PIECES)
def test_everything_is_done_once_and_the_worker_never_idles_while_something_may_begin(
    pieces: list[tuple[str, bool, int, float]],
) -> None:
    worker = Worker()
    lengths = {}
    for number, (tenant, interactive, positions, seconds) in enumerate(pieces):
        share = Share(1.0, 20.0) if tenant == "c" else EQUAL
        worker.add(tenant, str(number), share=share, interactive=interactive, positions=positions)
        lengths[str(number)] = seconds
    unlimited = sum(tenant != "c" for tenant, *_ in pieces)
    for _ in range(10 * len(pieces)):
        batch = worker.scheduler.next()
        if not batch:
            if not len(worker.scheduler):
                break
            assert worker.scheduler.waiting().keys() == {"c"}
            ready = worker.scheduler.ready_at()
            assert ready is not None
            worker.now = max(worker.now, ready) + 1e-6
            continue
        (job,) = batch
        worker.done.append(job)
        worker.now += lengths[job.work]
        worker.scheduler.finished(batch, lengths[job.work])
    assert sorted(int(job.work) for job in worker.done) == list(range(len(pieces)))
    assert sum(job.tenant != "c" for job in worker.done) == unlimited


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.floats(0.1, 2.0)), min_size=50, max_size=80))
def test_two_tenants_that_always_want_more_are_never_further_apart_than_a_piece(
    pieces: list[tuple[str, float]],
) -> None:
    """Goyal et al. (1996), theorem 1, with equal weights."""
    worker = Worker()
    for tenant in ("a", "b"):
        for _ in range(len(pieces)):
            worker.add(tenant)
    longest = max(seconds for _, seconds in pieces)
    for _, seconds in pieces:
        worker.turn(seconds)
        assert abs(worker.seconds["a"] - worker.seconds["b"]) <= longest + 1e-9


# Batches --------------------------------------------------------------------------------------------------------------

FORWARD, BACKWARD = Kind("forward", "backward"), Kind("backward", "forward")


@dataclass
class Together:
    """A worker that does batches; a session is a tenant's name and a number."""

    batching: Batching = field(default_factory=lambda: Batching(positions=100, smallest=5, window=0.5))
    now: float = 0.0
    scheduler: Scheduler[str] = field(init=False)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(lambda: self.now, self.batching)

    def add(self, session: str, kind: Kind | None = FORWARD, positions: int = 10, **options: Any) -> None:
        values = {"tenant": session.rstrip("0123456789"), "owner": session.encode(), "share": EQUAL, **options}
        self.scheduler.add(session, positions=positions, kind=kind, **values)

    def turn(self, per_position: float = 0.01, *, computed: bool = True) -> list[str]:
        """Do the next batch; returns whose pieces it had."""
        batch = self.scheduler.next()
        seconds = per_position * sum(job.positions for job in batch)
        self.now += seconds
        if batch:
            self.scheduler.finished(batch, seconds, () if computed else batch)
        return [job.work for job in batch]


def test_pieces_of_one_kind_are_done_together() -> None:
    worker = Together()
    for session in ("a", "b", "c"):
        worker.add(session)
    worker.add("d", BACKWARD)
    worker.add("e", None)
    worker.add("f", positions=4)  # too small
    batches = [worker.turn() for _ in range(4)]
    assert sorted(map(sorted, batches)) == [["a", "b", "c"], ["d"], ["e"], ["f"]]


def test_kinds_of_one_name_go_together_whatever_comes_after() -> None:
    worker = Together()
    worker.add("a", Kind("at 3", "at 4"))
    worker.add("b", Kind("at 3", "at 5"))
    worker.add("c", Kind("at 4", "at 5"))
    assert [worker.turn(), worker.turn()] == [["a", "b"], ["c"]]


def test_each_waits_for_those_who_come_to_its_own_place() -> None:
    worker = Together()
    worker.add("a", Kind("at 3", "at 4", pace="at 3"))
    worker.add("b", Kind("at 3", "at 5", pace="at 3"))
    worker.turn()
    worker.add("a", Kind("at 4", "at 5", pace="at 4"))
    assert worker.turn() == ["a"]  # b goes on somewhere else


def test_who_is_late_with_an_answer_holds_up_nobody_after_the_wait() -> None:
    """A step is as long as its own kind takes, and so is the wait for company at it."""
    worker = Together()
    at = [Kind(f"at {place}", f"at {place + 1}", pace=f"at {place}") for place in range(6)]
    for session in ("a", "late"):
        worker.add(session, Kind("forward", "at 0"))
    worker.turn(0.1)  # a whole pass
    for place in range(3):
        for session in ("a", "late"):
            worker.add(session, at[place])
        assert worker.turn(0.001) == ["a", "late"]
    worker.add("a", at[3])
    assert worker.turn(0.001) == ["a"]  # nothing is known of this place yet
    worker.add("late", at[3])
    assert worker.turn(0.001) == ["late"]
    worker.add("late", at[2])
    worker.add("b", at[2])
    assert sorted(worker.turn(0.001)) == ["b", "late"]
    worker.add("b", at[3])
    assert worker.turn(0.001) == []
    assert worker.scheduler.ready_at() == pytest.approx(worker.now + 20 * 0.001)
    worker.now += 20 * 0.001
    assert worker.turn(0.001) == ["b"]


def test_without_batching_every_piece_is_alone() -> None:
    worker = Together()
    worker.scheduler = Scheduler(lambda: worker.now)
    for session in ("a", "b"):
        worker.add(session)
    assert [worker.turn(), worker.turn()] == [["a"], ["b"]]


def test_a_batch_is_bounded_by_its_positions() -> None:
    worker = Together()
    for session, positions in (("a", 60), ("b", 50), ("c", 40), ("d", 200)):
        worker.add(session, positions=positions)
    assert [worker.turn() for _ in range(3)] == [["a", "c"], ["b"], ["d"]]


def test_a_sessions_pieces_are_never_in_one_batch() -> None:
    worker = Together()
    worker.add("a")
    worker.add("a")
    worker.add("a1")
    assert [sorted(worker.turn()), worker.turn()] == [["a", "a1"], ["a"]]


def test_a_tenant_that_floods_adds_no_more_than_its_share() -> None:
    worker = Together()
    for number in range(10):
        worker.add(f"flood{number}")
    for tenant in ("a", "b", "c"):
        worker.add(tenant)
    worker.add("x", None)
    worker.turn()
    first = Counter(name.rstrip("0123456789") for name in worker.turn())
    assert all(first[tenant] == 1 for tenant in ("a", "b", "c"))
    assert first["flood"] <= 2
    while len(worker.scheduler):
        assert worker.turn()  # the rest of it, once nobody else wants anything
    assert worker.scheduler.used()["flood"] == pytest.approx(1.0)


def test_a_tenant_alone_has_its_sessions_in_one_batch() -> None:
    worker = Together()
    for number in range(4):
        worker.add(f"a{number}")
    assert len(worker.turn()) == 4


def test_the_time_of_a_batch_is_charged_by_positions() -> None:
    worker = Together()
    worker.add("a", positions=30)
    worker.add("b", positions=10)
    worker.turn(0.1)
    assert worker.scheduler.used() == pytest.approx({"a": 3.0, "b": 1.0})


def test_training_waits_for_those_who_have_just_been_answered() -> None:
    worker = Together()
    for session in ("a", "b"):
        worker.add(session)
    assert worker.turn() == ["a", "b"]
    worker.add("a", BACKWARD)
    assert worker.turn() == []  # the backward of b will come
    ready = worker.scheduler.ready_at()
    assert ready == pytest.approx(worker.now + 20 * 0.01)  # no longer than the batch with both would take
    worker.add("b", BACKWARD)
    assert worker.turn() == ["a", "b"]
    worker.add("a")
    assert worker.turn() == []
    assert ready is not None
    worker.now += 20 * 0.01
    assert worker.turn() == ["a"]  # b has not come in time


def test_the_window_bounds_the_wait_and_a_full_batch_does_not_wait() -> None:
    worker = Together()
    for session in ("a", "b"):
        worker.add(session, positions=50)
    worker.turn(0.1)
    worker.add("a", BACKWARD, positions=50)
    assert worker.turn() == []
    assert worker.scheduler.ready_at() == pytest.approx(worker.now + 0.5)
    worker.add("c", BACKWARD, positions=50)
    assert worker.turn() == ["a", "c"]


def test_overdue_is_what_has_waited_for_longer_than_for_company_and_may_go_on() -> None:
    worker = Together()
    worker.add("a", None)
    worker.add("limited1", None, share=Share(positions_per_second=10.0), positions=25)
    worker.add("limited2", None, share=Share(positions_per_second=10.0), positions=25)
    assert worker.turn() == ["a"]
    assert worker.turn() == ["limited1"]
    worker.add("a", None)
    worker.now += 0.5
    assert worker.scheduler.overdue() == 0
    worker.now += 0.1
    assert worker.scheduler.overdue() == 1, "the limited tenant has had what it may have"
    worker.now += 2.0
    assert worker.scheduler.overdue() == 2


def test_without_batching_what_waits_is_overdue() -> None:
    worker = Worker()
    worker.add("a")
    worker.now += 0.1
    assert worker.scheduler.overdue() == 1


def test_who_takes_long_each_time_is_not_waited_for() -> None:
    worker = Together()
    for kind in (FORWARD, BACKWARD, FORWARD, BACKWARD):
        worker.add("slow", kind)
        assert worker.turn() == ["slow"]
        worker.now += 10.0  # that is how long it thinks
    worker.add("slow")
    worker.add("quick")
    assert sorted(worker.turn()) == ["quick", "slow"]
    worker.add("quick", BACKWARD)
    assert worker.turn() == ["quick"]
    worker.add("quick")
    assert worker.turn() == ["quick"]


def test_the_wait_is_as_long_as_the_pass_with_those_who_come() -> None:
    worker = Together()
    worker.add("small", positions=10)
    worker.add("large", positions=60)
    worker.turn(0.001)
    worker.add("large", BACKWARD, positions=60)
    assert worker.turn() == []
    assert worker.scheduler.ready_at() == pytest.approx(worker.now + 70 * 0.001)


def test_a_wait_for_company_keeps_the_deadline() -> None:
    worker = Together()
    for session in ("a", "b"):
        worker.add(session, positions=40)
    worker.turn(0.01)
    worker.add("a", BACKWARD, positions=40, deadline=0.5)  # forty positions take 0.4
    ready = None if worker.turn() else worker.scheduler.ready_at()
    assert ready is not None
    assert ready < worker.now + 0.1
    worker.now = ready
    assert worker.turn(0.01) == ["a"]
    assert worker.scheduler.take_late() == []


def test_a_batch_takes_nobody_along_who_would_make_a_deadline_be_missed() -> None:
    worker = Together()
    worker.add("first")
    worker.turn(0.01)
    worker.add("a", positions=30, deadline=0.5)
    worker.add("b", positions=30)  # sixty would take 0.6
    assert worker.turn(0.01) == ["a"]
    assert worker.turn(0.01) == ["b"]


def test_a_first_batch_that_took_long_is_forgotten() -> None:
    worker = Together(Batching(positions=100, smallest=5, window=0.0))
    for per_position in (1000.0, *[0.001] * 60):  # the first one waited for the disk
        worker.add("a")
        assert worker.turn(per_position) == ["a"]
    worker.add("chat", None, positions=0)
    worker.add("b", positions=20, deadline=1.0)
    worker.turn()
    worker.now += 0.9
    assert worker.turn() == ["b"]


def test_what_computed_nothing_teaches_nothing() -> None:
    worker = Together(Batching(positions=100, smallest=5, window=0.0))
    worker.add("a")
    worker.turn(0.1)
    for _ in range(20):
        worker.add("garbage", BACKWARD)
        worker.turn(0.00001, computed=False)  # refused
    worker.add("chat", None, positions=0)
    worker.add("b", positions=20, deadline=1.0)  # two seconds
    worker.turn()
    worker.now += 0.6
    assert worker.turn() == []
    assert [job.work for job in worker.scheduler.take_late()] == ["b"]


@pytest.mark.parametrize("why", ["gone", "late", "another kind", "interactive"])
def test_nobody_waits_in_vain(why: str) -> None:
    worker = Together()
    for session in ("a", "b"):
        worker.add(session)
    worker.turn()
    if why == "gone":
        worker.scheduler.cancel(b"b")
    elif why == "late":
        worker.now += 2 * THINK_SECONDS + 0.1
    worker.add("a", FORWARD if why == "another kind" else BACKWARD, interactive=why == "interactive")
    assert worker.turn() == ["a"]


def test_while_one_kind_waits_for_company_another_is_done() -> None:
    worker = Together()
    for session in ("a", "b"):
        worker.add(session)
    worker.turn()
    worker.add("a", BACKWARD)
    worker.add("c", None)
    assert worker.turn() == ["c"]


def test_what_waits_for_company_holds_back_no_other_session_of_its_tenant() -> None:
    worker = Together()
    for session in ("a1", "b"):
        worker.add(session)
    worker.turn()
    worker.add("a1", BACKWARD)
    worker.add("a2", None)
    assert worker.turn() == ["a2"]


def test_what_cannot_keep_its_deadline_any_more_is_given_up() -> None:
    worker = Together()
    worker.add("a")
    worker.turn(0.1)  # a position takes 0.1 s, ten of them 1.0
    worker.add("chat", None, interactive=True)
    for session, deadline in (("b", 1.9), ("c", 2.1)):
        worker.add(session, deadline=deadline)
    worker.add("d")
    assert worker.turn(0.1) == ["chat"]
    assert worker.turn(0.1) == ["c"]  # with d beside it, it would be late
    assert [job.work for job in worker.scheduler.take_late()] == ["b"]
    assert worker.turn(0.1) == ["d"]
    assert worker.scheduler.take_late() == []
    assert len(worker.scheduler) == 0


def test_a_bad_guess_keeps_nobody_out() -> None:
    worker = Together()
    worker.add("a")
    worker.turn(100.0)  # something held the worker up
    worker.add("b", deadline=1.0)
    assert worker.turn(0.01) == ["b"]


def test_who_waits_for_a_budget_is_told_in_time() -> None:
    worker = Together()
    limited = Share(1.0, 1.0)
    worker.add("limited1", positions=50, share=limited)
    worker.turn(0.01)
    worker.add("limited2", positions=50, share=limited, deadline=5.0)
    assert worker.turn() == []
    ready = worker.scheduler.ready_at()
    assert ready == pytest.approx(worker.now + 5.0 - 50 * 0.01)
    assert ready is not None
    worker.now = ready + 1e-6
    assert worker.turn() == []
    assert [job.work for job in worker.scheduler.take_late()] == ["limited2"]


def test_interactive_and_training_do_not_share_a_batch() -> None:
    worker = Together()
    worker.add("a")
    worker.add("b", interactive=True)
    worker.add("c", interactive=True)
    assert [worker.turn(), worker.turn()] == [["b", "c"], ["a"]]


def test_a_limited_tenant_joins_no_batch_while_its_budget_is_overdrawn() -> None:
    worker = Together()
    limited = Share(1.0, 10.0)
    worker.add("limited1", positions=50, share=limited)
    worker.turn(0.001)
    worker.add("limited2", positions=50, share=limited)
    worker.add("a")
    assert worker.turn(0.001) == ["a"]
    assert worker.turn() == []
    ready = worker.scheduler.ready_at()
    assert ready is not None
    worker.now = ready + 1e-6
    assert worker.turn() == ["limited2"]


@given(
    st.lists(
        st.tuples(TENANTS, st.integers(0, 3), st.sampled_from([FORWARD, BACKWARD, None]), st.integers(0, 60)),
        min_size=1,
        max_size=60,
    )
)
def test_everything_is_done_once_in_the_order_of_its_session(pieces: list[tuple[str, int, Kind | None, int]]) -> None:
    worker = Together()
    expected: dict[str, list[int]] = {}
    for number, (tenant, session, kind, positions) in enumerate(pieces):
        name = f"{tenant}{session}"
        expected.setdefault(name, []).append(number)
        worker.scheduler.add(
            str(number), tenant=tenant, owner=name.encode(), share=EQUAL, positions=positions, kind=kind
        )
    done: dict[str, list[int]] = {}
    while len(worker.scheduler):
        batch = worker.scheduler.next()
        if not batch:
            ready = worker.scheduler.ready_at()
            assert ready is not None
            worker.now = max(worker.now, ready) + 1e-6
            continue
        assert len({job.owner for job in batch}) == len(batch)
        assert len(batch) == 1 or sum(job.positions for job in batch) <= worker.batching.positions
        for job in batch:
            done.setdefault(job.owner.decode(), []).append(int(job.work))
        worker.now += 0.1
        worker.scheduler.finished(batch, 0.1)
    assert done == expected


# Several batches at a time -------------------------------------------------------------------------------------------

OPENING = Kind("open", "close", opens=True, anywhere=True)
CLOSING = Kind("close", "open", closes=True, anywhere=True)


@dataclass
class Lanes(Together):
    """A worker with two lanes, and memory for so many token positions; what begins ends when it is told."""

    room: float = 60.0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(lambda: self.now, self.batching, lambda: self.room, 2)

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
    assert names(first + second) == ["a", "b"]  # each by itself: a batch leaves room for closing
    assert worker.begin() == []  # 60 are open
    worker.end(first)
    worker.end(second)
    assert worker.begin() == []  # a and b will close soon
    for session in ("a", "b"):
        worker.add(session, CLOSING, positions=30)
    assert [names(worker.begin()) for _ in range(2)] == [["a"], ["b"]]  # a lane for each
    assert names(worker.begin()) == ["c"]  # while they close, there is room: 2 x 30 x 0.5 + 30 = 60

    patient = Lanes(batching=Batching(positions=100, smallest=5, window=0.5, open_calls=2))
    for session in ("a", "b"):
        patient.add(session, OPENING, positions=30)
    for batch in (patient.begin(), patient.begin()):
        patient.end(batch)
    patient.add("c", OPENING, positions=30)
    assert patient.begin() == []
    patient.now += THINK_SECONDS + 0.01  # nobody knows a and b, which are not expected any more
    assert names(patient.begin()) == ["c"]


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
        pytest.param(("a", "b"), None, 4.0, id="until the others are overdue, whatever the window"),
        pytest.param(("a", "b"), 3.5, 2.5, id="as long as the deadline allows"),
        pytest.param(("a1", "a2"), None, 0.0, id="not for what a tenant has beyond its share"),
    ],
)
def test_who_wants_room_waits(sessions: tuple[str, ...], deadline: float | None, seconds: float) -> None:
    worker = holding(*sessions)
    since = worker.now
    worker.add("newcomer", OPENING, positions=30, deadline=deadline)
    while not (batch := worker.begin()):
        assert worker.scheduler.overdue() == 0, "it waits for room, and not because there is too much work"
        worker.now += RETHINK_SECONDS
        assert worker.now < since + 10
    assert names(batch) == ["newcomer"]
    assert worker.now - since == pytest.approx(seconds, abs=2 * RETHINK_SECONDS)


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
    for session, positions in (("a", 13), ("b", 13), ("c", 15), ("d", 15)):
        worker.add(session, OPENING, positions=positions)
    batch = worker.begin()
    assert names(batch) == ["a", "b"]
    worker.now += 0.1
    worker.scheduler.finished(batch, 0.1, [job for job in batch if job.work == "b"])
    assert names(worker.begin()) == ["c"]  # 13 are open
    assert worker.begin() == []  # 28 are


def test_who_comes_seldom_does_not_keep_the_others_apart() -> None:
    worker = Together()
    for _ in range(2):
        worker.add("seldom")
        worker.turn()
        worker.now += 20
    worker.add("seldom")
    worker.turn()  # and is expected back in 20 seconds
    for session in ("a", "b"):
        worker.add(session)
    for _ in range(60):
        now = worker.now
        assert sorted(worker.turn(per_position=0.01)) == ["a", "b"]
        assert worker.now - now < 1
        for session in ("a", "b"):
            worker.add(session)
    assert worker.scheduler.used()["a"] > LEAD_SECONDS


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
