"""What sessions have left in memory."""

from __future__ import annotations

from isthmus.cloud.attendance import Open


def test_what_a_session_leaves_counts_until_it_takes_it_out() -> None:
    left = Open()
    left.add(b"a", 5)
    left.add(b"b", 7)
    assert (left.beside(b"a"), left.positions([b"a", b"b", b"c"])) == ([b"b"], 12)
    left.forget(b"b")
    assert (left.beside(b"a"), left.positions([b"a", b"b"])) == ([], 5)


def test_a_session_that_leaves_more_counts_for_nothing_until_it_takes_something_out() -> None:
    left = Open()
    for positions in (5, 6, 7):
        left.add(b"a", positions)
    assert (left.beside(b"b"), left.positions([b"a"])) == ([], 0)
    left.forget(b"a")
    left.add(b"a", 8)
    assert (left.beside(b"b"), left.positions([b"a"])) == ([b"a"], 8)


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
    assert (left.beside(b"b"), left.positions([b"a"])) == ([], 0)
