"""When sessions are expected, and what they have left in memory."""

from __future__ import annotations

import math

from isthmus.cloud.engine.expected_sessions import OVERDUE, THINK_SECONDS, Answered, Attendance, Open


def test_a_session_is_expected_after_the_shorter_of_the_last_two_times() -> None:
    sessions = Attendance()

    def answer(now: float) -> None:
        sessions.answered(b"a", Answered("tenant", "backward", now, 5))

    answer(0.0)
    assert sessions.due(b"a", THINK_SECONDS) == THINK_SECONDS  # at any moment
    assert sessions.due(b"a", THINK_SECONDS + 0.01) == math.inf
    sessions.asks(b"a", 0.5)
    answer(1.0)
    sessions.asks(b"a", 61.0)  # it has evaluated
    answer(70.0)
    assert sessions.due(b"a", 70.0) == 70.5
    assert sessions.due(b"a", 70.0 + OVERDUE * 0.5 + 0.01) == math.inf
    sessions.asks(b"a", 130.0)  # it does so each time
    answer(200.0)
    assert sessions.due(b"a", 200.0) == 260.0


def test_what_a_session_leaves_counts_until_it_takes_it_out() -> None:
    left = Open()
    left.add(b"a", 5)
    left.add(b"b", 7)
    assert (left.owners(), left.positions([b"a", b"b", b"c"])) == ([b"a", b"b"], 12)
    left.forget(b"b")
    assert (left.owners(), left.positions([b"a", b"b"])) == ([b"a"], 5)


def test_a_session_that_leaves_more_counts_for_nothing_until_it_takes_something_out() -> None:
    left = Open()
    for positions in (5, 6, 7):
        left.add(b"a", positions)
    assert (left.owners(), left.positions([b"a"])) == ([], 0)
    left.forget(b"a")
    left.add(b"a", 8)
    assert (left.owners(), left.positions([b"a"])) == ([b"a"], 8)


def test_what_has_failed_has_left_nothing_and_changes_nothing() -> None:
    left = Open()
    left.add(b"a", 5)
    left.add(b"a", 6)
    left.withdraw(b"a")
    assert left.positions([b"a"]) == 5  # one is there still
    left.add(b"a", 6)
    left.add(b"a", 7)
    left.withdraw(b"a")
    assert left.positions([b"a"]) == 0  # two are
    left.forget(b"a")
    left.add(b"a", 6)
    left.withdraw(b"a")
    assert (left.owners(), left.positions([b"a"])) == ([], 0)
