"""The invariants of histories: a good one keeps them, and each kind of bad one is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isthmus.cloud.telemetry.event_history import ENVIRONMENT, record
from isthmus.common.errors import IsthmusError
from isthmus.experiments.rigs.histories import (
    FENCED,
    INVARIANTS,
    ONCE,
    ONE_SESSION,
    QUOTA,
    Event,
    read_history,
    sessions_of,
    violations,
)


def opened(at: float, process: int, session: str, link: str = "a", allowed: int = 1, tenant: str = "alice") -> Event:
    return Event(at, process, "opened", {"session": session, "link": link, "tenant": tenant, "allowed": allowed})


def ended(at: float, process: int, session: str, why: str = "fenced") -> Event:
    return Event(at, process, "ended", {"session": session, "why": why})


def answered(at: float, session: str, call: tuple[int, int, int], link: str = "a", kind: str = "forwardreply") -> Event:
    return Event(at, 1, "answered", {"session": session, "link": link, "kind": kind, "call": list(call)})


def heard(process: int, *moments: float) -> list[Event]:
    return [Event(at, process, "heard") for at in moments]


def broken(events: list[Event]) -> set[str]:
    found = violations(sorted(events, key=lambda event: event.at))
    assert set(found) == set(INVARIANTS)
    return {name for name, places in found.items() if places}


def test_a_reconnect_that_fences_keeps_all_of_them() -> None:
    history = [
        opened(1, 1, "s"),
        answered(2, "s", (1, 1, 0)),
        ended(3, 1, "s"),
        opened(3.1, 1, "t"),
        answered(4, "t", (1, 1, 1)),  # the same call, at its second attempt
        Event(5, 1, "closed", {"session": "t"}),
    ]
    assert broken(history) == set()


def test_two_sessions_of_a_link_at_one_worker() -> None:
    history = [opened(1, 1, "s", allowed=2), opened(2, 1, "t", allowed=2), ended(5, 1, "s")]
    assert broken(history) == {ONE_SESSION}


def test_two_sessions_of_a_link_at_two_workers_are_bad_once_both_know() -> None:
    both = [opened(1, 1, "s", allowed=2), opened(2, 2, "t", allowed=2)]
    soon = [*both, *heard(1, 2.1, 2.2), ended(2.25, 1, "s"), *heard(1, 2.3)]
    assert broken(soon) == set()
    late = [*both, *heard(1, 2.1, 2.2, 2.3), ended(9, 1, "s")]
    assert broken(late) == {ONE_SESSION}


def test_more_sessions_than_a_tenant_may_have() -> None:
    over = [opened(1, 1, "s", "a"), opened(2, 1, "t", "b"), ended(9, 1, "s", "x"), ended(9, 1, "t", "x")]
    assert broken(over) == {QUOTA}
    elsewhere = [
        opened(1, 1, "s", "a"),
        opened(2, 2, "t", "b"),
        *heard(2, 3, 4, 5),
        ended(9, 1, "s", "x"),
        ended(9, 2, "t", "x"),
    ]
    assert broken(elsewhere) == {QUOTA}
    unheard = [event for event in elsewhere if event.name != "heard"]
    assert broken(unheard) == set()
    another = [opened(1, 1, "s", "a"), opened(2, 1, "t", "b", tenant="bob"), *heard(1, 9)]
    assert broken(another) == set()


def test_a_call_that_is_answered_twice() -> None:
    history = [opened(1, 1, "s"), answered(2, "s", (1, 1, 0)), answered(3, "s", (1, 1, 0))]
    assert broken(history) == {ONCE}
    backward = [opened(1, 1, "s"), answered(2, "s", (1, 1, 0)), answered(3, "s", (1, 1, 0), kind="backwardreply")]
    assert broken(backward) == set()


def test_an_answer_of_a_fenced_session() -> None:
    history = [opened(1, 1, "s"), ended(2, 1, "s"), answered(3, "s", (1, 1, 0))]
    assert broken(history) == {FENCED}
    drained = [opened(1, 1, "s"), ended(2, 1, "s", "draining"), answered(3, "s", (1, 1, 0))]
    assert broken(drained) == set()


def test_a_killed_worker_has_no_sessions_after_its_last_event() -> None:
    history = [opened(1, 1, "s"), answered(2, "s", (1, 1, 0)), opened(3, 2, "t"), *heard(2, 4, 5, 6)]
    assert [session.ended for session in sessions_of(history)] == [2, 6]
    assert broken(history) == set()


def test_what_is_recorded_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record("opened", session="s")  # nobody wants it
    with pytest.raises(IsthmusError, match="nothing to check"):
        read_history(tmp_path)
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    record("opened", session="s")
    record("heard")
    (tmp_path / "1.jsonl").write_text(json.dumps({"at": 0.5, "event": "heard"}) + "\n")
    assert [(event.name, event.fields) for event in read_history(tmp_path)] == [
        ("heard", {}),
        ("opened", {"session": "s"}),
        ("heard", {}),
    ]
