"""The order of several tenants' requests: fairness, interactive ones, rates, pacing, memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, strategies as st
from support.cloud.manual_scheduler import FORWARD, Worker, names, request

from isthmus.cloud.engine.batching import SchedulerLimits
from isthmus.cloud.engine.requests import Request, Share
from isthmus.cloud.engine.scheduler import AnsweredSessions, TenantAccount


class Alone(Worker):
    """A worker that computes each request by itself; notes whose turns it has done, and their seconds.

    Tenants have one session, which may have several requests, so that nobody is paced.
    """

    def __init__(self, **limits: Any) -> None:
        super().__init__(SchedulerLimits(**{"smallest": float("inf"), "max_wait": 0.0, **limits}))
        self.seconds: Counter[str] = Counter()

    def ask(self, tenant: str, count: int = 1, **options: Any) -> None:
        """Let requests of a tenant wait."""
        for _ in range(count):
            self.scheduler.add(request(tenant, **options))

    def take(self, seconds: float = 1.0) -> str | None:
        """Do the next request, which takes so long; returns whose it was."""
        batch = self.begin()
        if not batch:
            return None
        (one,) = batch
        self.end(batch, seconds)
        self.seconds[one.tenant] += seconds
        return one.tenant

    def takes(self, count: int, seconds: float = 1.0) -> list[str | None]:
        return [self.take(seconds) for _ in range(count)]


def jain(values: Sequence[float]) -> float:
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def test_nothing_waits() -> None:
    worker = Worker()
    assert worker.begin() == []
    assert worker.scheduler.ready_at() is None
    assert len(worker.scheduler) == 0


def test_equal_tenants_take_turns_whatever_the_length_of_their_queues() -> None:
    worker = Alone()
    worker.ask("flood", 20)
    for tenant in ("a", "b"):
        worker.ask(tenant, 2)
    assert Counter(worker.takes(6)) == {"flood": 2, "a": 2, "b": 2}
    assert worker.takes(3) == ["flood"] * 3


def test_shares_are_of_time_and_not_of_requests() -> None:
    worker = Alone()
    worker.ask("long", 100)
    worker.ask("short", 100)
    while worker.scheduler.waiting().keys() == {"long", "short"}:
        times = worker.virtual_times()
        worker.take(5.0 if times["long"] <= times["short"] else 1.0)
    assert jain([*worker.seconds.values()]) > 0.99


def test_weights_are_shares() -> None:
    worker = Alone()
    worker.ask("heavy", 100, share=Share(3.0))
    worker.ask("light", 100)
    worker.takes(80)
    assert worker.seconds["heavy"] == pytest.approx(60, abs=3)


def test_who_comes_late_neither_catches_up_nor_waits_for_the_others_to_catch_up() -> None:
    worker = Alone()
    worker.ask("early", 60)
    worker.takes(30)
    worker.ask("late", 30)
    assert Counter(worker.takes(20)) == {"early": 10, "late": 10}


def test_who_had_the_worker_alone_owes_nothing() -> None:
    worker = Alone()
    worker.ask("first", 50)
    worker.takes(50)
    worker.ask("second", 10)
    worker.ask("first", 10)
    assert Counter(worker.takes(10)) == {"first": 5, "second": 5}


def test_a_tenant_that_comes_and_goes_has_its_turn_next() -> None:
    worker = Alone()
    worker.ask("flood", 50)
    worker.takes(5)
    for _ in range(10):
        worker.ask("sometimes")
        assert "sometimes" in worker.takes(2)
        worker.takes(2)


def test_interactive_requests_come_first_as_long_as_their_tenant_is_not_far_ahead() -> None:
    worker = Alone(interactive_lead=2.0)
    worker.ask("training", 40)
    worker.ask("chat", 40, interactive=True)
    order = worker.takes(40)
    assert order[:3] == ["chat"] * 3
    assert 20 <= Counter(order)["chat"] <= 23


def test_a_session_has_one_request_running_and_keeps_their_order() -> None:
    worker = Worker()
    worker.add("a", kind=None)
    worker.add("a", kind=FORWARD)
    first = worker.begin()
    assert first[0].kind is None
    assert worker.begin() == []
    worker.end(first, 1.0)
    assert worker.begin()[0].kind is FORWARD


def test_a_limited_tenant_is_held_to_its_rate_and_leaves_the_worker_to_others() -> None:
    worker = Alone()
    worker.ask("limited", 100, share=Share(1.0, 100.0), positions=50)
    done = 0
    while worker.now < 20:
        if worker.take(0.01) is None:
            worker.pass_time()
        else:
            done += 50
    assert done == pytest.approx(20 * 100 + 100, abs=100)
    worker.ask("other", positions=1000)
    worker.take(0.01)
    assert worker.scheduler.waiting().keys() == {"limited"}


def test_what_continues_counts_once_against_the_rate_and_is_charged_its_time() -> None:
    worker = Alone()
    limited = Share(1.0, 10.0)
    for rate_positions in (None, 0, 0):
        worker.ask("limited", share=limited, positions=40, rate_positions=rate_positions)
    assert worker.takes(3, 0.1) == ["limited"] * 3
    assert worker.virtual_times()["limited"] == pytest.approx(0.3)
    worker.ask("limited", share=limited, positions=1)
    assert worker.take() is None
    since = worker.now
    while worker.take() is None:
        worker.pass_time()
    assert worker.now - since == pytest.approx(4.0, abs=1.5)  # forty less the ten of the first second, at ten a second


def test_what_could_not_begin_is_not_charged_for_the_others_of_its_batch() -> None:
    worker = Worker()
    worker.add("a", "b")
    batch = worker.begin()
    assert names(batch) == ["a", "b"]
    worker.end(batch, 1.0, begun=[each for each in batch if each.tenant == "a"])
    assert worker.virtual_times() == {"a": 1.0, "b": 0.0}
    assert worker.scheduler._speed.seconds([request("a")]) == 1.0  # all of it for the ten positions that were computed
    assert [last.tenant for _, last in worker.scheduler._answered.at_work(worker.now)] == ["a"]
    worker.add("b")
    present = worker.virtual_times()["b"]
    worker.end(worker.begin(), 0.25, begun=[])
    assert worker.virtual_times()["b"] == present + 0.25  # the attempt was its own
    assert worker.scheduler._speed.seconds([request("b")]) == 1.0


def test_a_rate_that_comes_later_counts_from_then_on() -> None:
    worker = Alone()
    worker.ask("a", positions=1_000_000)
    worker.take(0.1)
    worker.ask("a", share=Share(1.0, 10.0), positions=1)
    assert worker.take(0.1) == "a"


def test_what_is_cancelled_has_no_turn() -> None:
    worker = Worker()
    worker.add("a", "a1", "b", kind=None)
    assert names(worker.scheduler.cancel(b"a")) == ["a"]
    assert sorted((*worker.turn(), *worker.turn())) == ["a1", "b"]
    assert worker.turn() == []
    worker.add("z")
    assert names(worker.scheduler.clear()) == ["z"]
    assert len(worker.scheduler) == 0


def test_a_session_that_ends_while_it_is_computed_for_is_not_at_work() -> None:
    worker = Worker()
    worker.add("a", "b")
    batch = worker.begin()
    worker.scheduler.cancel(b"b")
    worker.end(batch, 0.1)
    assert worker.scheduler.sessions_at_work() == 1


def test_overdue_is_what_waits_for_longer_than_it_may_be_held_back() -> None:
    worker = Worker(SchedulerLimits(max_wait=0.5))
    worker.add("a", kind=None)
    worker.add("limited1", "limited2", kind=None, share=Share(positions_per_second=10.0), positions=25)
    assert [worker.turn(), worker.turn()] == [["a"], ["limited1"]]
    worker.add("a", kind=None)
    worker.now += 0.5
    assert worker.scheduler.overdue() == 0
    worker.now += 0.1
    assert worker.scheduler.overdue() == 1, "the limited tenant has had what it may have"
    worker.now += 2.0
    assert worker.scheduler.overdue() == 2


# Pacing ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sessions", "paced"), [(1, False), (3, True)])
def test_a_tenant_with_several_sessions_is_held_to_its_share_while_others_are_at_work(
    sessions: int, paced: bool
) -> None:
    worker = Worker(SchedulerLimits(smallest=float("inf")))
    worker.add("a", *(f"flood{number}" for number in range(sessions)))
    for session in ("a", "flood0"):
        batch = worker.begin()
        assert names(batch) == [session]
        worker.end(batch, 0.5)
    if not paced:
        worker.add("flood0")
    batch = worker.begin()
    assert (batch == []) is paced  # of two tenants each has half of the time, so it rests for as long as it worked
    while not batch:
        worker.pass_time()
        batch = worker.begin()
    assert batch[0].tenant == "flood"
    assert worker.now == pytest.approx(1.5 if paced else 1.0, abs=0.06)


def test_interactive_requests_are_not_paced() -> None:
    worker = Worker(SchedulerLimits(smallest=float("inf")))
    worker.add("a", "flood1", "flood2")
    for _ in range(2):
        worker.end(worker.begin(), 0.5)
    assert worker.begin() == []
    worker.add("flood3", interactive=True)
    assert names(worker.begin()) == ["flood3"]


# Memory of what runs --------------------------------------------------------------------------------------------------


def within(compute_bytes: float) -> Worker:
    return Worker(SchedulerLimits(compute_bytes=compute_bytes, compute_threads=2))


def test_what_does_not_fit_beside_what_runs_waits_for_it() -> None:
    worker = within(100)
    worker.add("a", "b", "c", "d", nbytes=60)
    first = worker.begin()
    assert len(first) == 1, "two may share a batch, and do not fit together"
    assert worker.begin(parallel=True) == []
    worker.end(first, 1.0)
    assert len(worker.begin(parallel=True)) == 1


def test_with_more_memory_they_share_a_batch() -> None:
    worker = within(240)
    worker.add("a", "b", "c", "d", nbytes=60)
    assert len(worker.begin()) == 2
    assert len(worker.begin(parallel=True)) == 2


def test_small_requests_do_not_keep_a_large_one_out() -> None:
    worker = within(100)
    worker.add("a", nbytes=60)
    running = worker.begin()
    worker.add("large", kind=None, nbytes=90)
    worker.now += 0.01
    worker.add("small", kind=None, nbytes=10)  # would fit beside the first
    assert worker.begin() == []
    worker.end(running, 0.1)
    assert names(worker.begin()) == ["large"]


@pytest.mark.parametrize(("sited", "together"), [(90, 0), (60, 1), (40, 2)])
def test_a_thread_leaves_memory_for_what_only_the_first_may_take(sited: int, together: int) -> None:
    worker = within(100)
    worker.add("sited", kind=None, nbytes=sited)
    worker.add("a", "b", "c", "d", nbytes=30)
    assert len(worker.begin(parallel=True)) == together
    assert names(worker.begin()) == ["sited"]


# What is known of tenants and sessions --------------------------------------------------------------------------------


def test_a_rate_saves_up_a_second_and_may_be_overdrawn_once() -> None:
    account = TenantAccount(Share(1.0, 10.0), 0.0, 0.0)
    account.refill(100.0)
    assert account.budget == 10.0
    account.budget -= 40
    assert account.overdrawn == pytest.approx(3.0)
    account.refill(103.0)
    assert account.overdrawn == 0.0
    assert TenantAccount(Share(), 0.0, 0.0).overdrawn == 0.0


def test_a_charge_is_by_weight() -> None:
    account = TenantAccount(Share(4.0), 1.0, 0.0)
    account.charge(2.0)
    assert account.virtual_time == 1.5


def test_work_is_paced_by_its_fraction() -> None:
    account = TenantAccount(Share(), 0.0, 0.0)
    for begun, until in ((10.0, 14.0), (12.0, 18.0), (100.0, 104.0)):
        account.worked(begun, 1.0, 0.25)
        assert account.paced_until == until


def test_a_session_is_at_work_for_a_while_after_its_answer() -> None:
    sessions = AnsweredSessions(2.0)
    sessions.answered(b"a", "tenant", 0.0, 10)
    assert [session for session, _ in sessions.at_work(2.0)] == [b"a"]
    assert [*sessions.at_work(2.1)] == []
    sessions.forget(b"a")
    assert [*sessions.at_work(0.0)] == []


def test_a_session_is_expected_for_twice_as_long_as_it_was_away_the_last_time() -> None:
    sessions = AnsweredSessions(2.0)
    sessions.answered(b"a", "tenant", 0.0, 10)
    assert [*sessions.expected(0.0)] == [*sessions.expected(0.1)] == [], "it has never come back"
    sessions.asks(b"a", 0.5)
    sessions.answered(b"a", "tenant", 1.0, 10)
    assert [last.positions for last in sessions.expected(2.0)] == [10]
    assert [*sessions.expected(2.01)] == []


# In general -----------------------------------------------------------------------------------------------------------

TENANTS = st.sampled_from(["a", "b", "c"])
REQUESTS = st.lists(
    st.tuples(TENANTS, st.booleans(), st.integers(0, 50), st.floats(0.01, 3.0)), min_size=1, max_size=60
)


@given(REQUESTS)
def test_everything_is_done_once_and_the_worker_never_idles_while_something_may_begin(
    asked: list[tuple[str, bool, int, float]],
) -> None:
    worker = Alone()
    seconds = {}
    for number, (tenant, interactive, positions, length) in enumerate(asked):
        share = Share(1.0, 20.0) if tenant == "c" else Share()
        each = request(tenant, positions, share=share, interactive=interactive, nbytes=number)
        worker.scheduler.add(each)
        seconds[number] = length
    done: list[Request[Any]] = []
    while len(worker.scheduler):
        batch = worker.begin()
        if not batch:
            assert worker.scheduler.waiting().keys() == {"c"}
            worker.pass_time()
            continue
        done += batch
        worker.end(batch, seconds[batch[0].nbytes])
    assert sorted(each.nbytes for each in done) == sorted(seconds)


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.floats(0.1, 2.0)), min_size=50, max_size=80))
def test_two_tenants_that_always_want_more_are_never_further_apart_than_a_request(
    asked: list[tuple[str, float]],
) -> None:
    """Goyal et al. (1996), theorem 1, with equal weights."""
    worker = Alone()
    for tenant in ("a", "b"):
        worker.ask(tenant, len(asked), kind=None)
    longest = max(seconds for _, seconds in asked)
    for _, seconds in asked:
        worker.take(seconds)
        assert abs(worker.seconds["a"] - worker.seconds["b"]) <= longest + 1e-9
