"""Who is at work, and who is expected back."""

from __future__ import annotations

from isthmus.cloud.engine.answered_sessions import AnsweredSessions


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
