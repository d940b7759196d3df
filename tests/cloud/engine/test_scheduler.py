"""The order of several tenants' work, with a clock that stands still unless it is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, strategies as st
from support.cloud.manual_scheduler import Together

from isthmus.cloud.engine.requests import Batching, Job, Share
from isthmus.cloud.engine.scheduler import LEAD_SECONDS, Scheduler

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


def test_without_batching_what_waits_is_overdue() -> None:
    worker = Worker()
    worker.add("a")
    worker.now += 0.1
    assert worker.scheduler.overdue() == 1


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


def test_a_tenant_whose_positions_take_long_has_no_other_s_calls_refused() -> None:
    worker = Together(Batching(positions=100, smallest=5, window=0.0))
    worker.add("b", positions=20)
    worker.turn(0.001)
    for _ in range(10):
        worker.add("long", positions=20)  # long sequences: each position takes a hundred times as long
        worker.turn(0.1)
    worker.add("b", positions=20, deadline=1.0)
    worker.now += 0.9  # it takes 0.02 seconds, and not 2
    assert worker.scheduler.take_late() == []
    assert worker.turn(0.001) == ["b"]
    worker.add("long", positions=20, deadline=1.0)
    worker.now += 0.9
    assert [job.work for job in worker.scheduler.take_late()] == ["long"]
