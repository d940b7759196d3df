"""What of several tenants' work is done together, and how long it waits for company."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, strategies as st
from support.cloud.manual_scheduler import BACKWARD, EQUAL, FORWARD, Together

from isthmus.cloud.engine.expected_sessions import THINK_SECONDS
from isthmus.cloud.engine.requests import Batching, Kind, Share
from isthmus.cloud.engine.scheduler import LEAD_SECONDS, Scheduler


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


TENANTS = st.sampled_from(["a", "b", "c"])


@given(
    st.lists(
        st.tuples(
            TENANTS,
            st.integers(0, 3),
            st.sampled_from([FORWARD, BACKWARD, None]),
            st.integers(0, 60),
        ),
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


def test_the_crowd_is_looked_at_as_often_however_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    sessions_at = Scheduler._sessions_at

    def counted(self: Scheduler[str], now: float) -> Any:
        nonlocal looks
        looks += 1
        return sessions_at(self, now)

    monkeypatch.setattr(Scheduler, "_sessions_at", counted)

    def most_looks(tenants: int) -> int:
        """While a batch is taken, or nothing more has room."""
        worker = Together()
        worker.scheduler = Scheduler(lambda: worker.now, worker.batching, room=lambda: 50.0, lanes=2)
        for number in range(tenants):
            worker.add(f"{number}", Kind("open", "close", opens=True), tenant=f"tenant {number}")
        counts, taken = [], 1
        while taken:
            before = looks
            taken = len(worker.scheduler.next())
            counts.append(looks - before)
        assert len(worker.scheduler) > tenants // 2, "most have no room"
        return max(counts)

    assert most_looks(100) == most_looks(10)
