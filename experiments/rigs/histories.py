"""Histories that workers have written, four invariants that each must keep, and the places where one breaks them.

A worker learns from the controller's reports that another worker has admitted a session. The `REPORTS`-th report after
that admission was surely asked for after it, so from there on the invariants hold across workers. Within one worker
they hold at once.

The idea, histories written by the system under test and checked afterwards, is that of Jepsen (Kingsbury).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from isthmus.cloud.gateway.open_sessions import REPORTS
from isthmus.common.errors import IsthmusError

ONE_SESSION: Final = "one_session_per_link"
QUOTA: Final = "quota_over_all_workers"
ONCE: Final = "effects_at_most_once"
FENCED: Final = "no_answer_when_fenced"
INVARIANTS: Final = (ONE_SESSION, QUOTA, ONCE, FENCED)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a worker did.

    Attributes:
        name: What; see `isthmus.cloud.telemetry.event_history`.
    """

    at: float
    process: int
    name: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Session:
    """A session, by its history.

    Attributes:
        link: The edge's name for its link.
        allowed: How many sessions the tenant may have.
        ended: When it was asked to end, or closed, or gave its last sign of life where its process was killed.
    """

    id: str
    process: int
    link: str
    tenant: str
    allowed: int
    opened: float
    ended: float


def read_history(folder: Path) -> list[Event]:
    """The events of all processes that wrote to a folder, in the order of time.

    Raises IsthmusError where there are none.
    """
    events = []
    for file in folder.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            read = json.loads(line)
            events.append(Event(read.pop("at"), int(file.stem), read.pop("event"), read))
    if not events:
        raise IsthmusError(f"no worker has written a history to {folder}, so there is nothing to check")
    return sorted(events, key=lambda event: event.at)


def sessions_of(events: Sequence[Event]) -> list[Session]:
    """All sessions, in the order of their opening.

    Of a process that was killed, nobody knows when exactly: its sessions live until its last event, which is the least
    that is certain.
    """
    last = {event.process: event.at for event in events}
    ends: dict[str, float] = {}
    for event in events:
        if event.name in ("ended", "closed"):
            ends.setdefault(event.fields["session"], event.at)
    return [
        Session(
            event.fields["session"],
            event.process,
            event.fields["link"],
            event.fields["tenant"],
            event.fields["allowed"],
            event.at,
            ends.get(event.fields["session"], last[event.process]),
        )
        for event in events
        if event.name == "opened"
    ]


def reports_heard(events: Iterable[Event]) -> dict[int, list[float]]:
    """By process, when it heard of the other workers."""
    heard: dict[int, list[float]] = {}
    for event in events:
        if event.name == "heard":
            heard.setdefault(event.process, []).append(event.at)
    return heard


def violations(events: Sequence[Event]) -> dict[str, list[str]]:
    """Where a history breaks the invariants: by invariant, a line for each place; no line where it keeps it."""
    sessions, heard = sessions_of(events), reports_heard(events)
    return {
        ONE_SESSION: _two_of_a_link(sessions, heard),
        QUOTA: _over_quota(sessions, heard),
        ONCE: _answered_twice(events),
        FENCED: _answered_when_fenced(events),
    }


def _two_of_a_link(sessions: Sequence[Session], heard: dict[int, list[float]]) -> list[str]:
    """Sessions that live on although their link has a newer one that their worker knows of."""
    found = []
    by_link: dict[str, list[Session]] = defaultdict(list)
    for session in sessions:
        by_link[session.link].append(session)
    for mine in by_link.values():
        for older, newer in ((a, b) for a in mine for b in mine if a.opened < b.opened):
            until = _known_to(older, newer, heard)
            if until is not None and older.ended > until:
                found.append(
                    f"session {older.id} lived for {older.ended - until:.3f} s although its link had {newer.id} and "
                    "its worker knew it"
                )
    return found


def _over_quota(sessions: Sequence[Session], heard: dict[int, list[float]]) -> list[str]:
    """Sessions over their tenant's quota that live on although their worker knows of the others."""
    found = []
    for session in sessions:
        older = [
            other
            for other in sessions
            if other.tenant == session.tenant
            and other.link != session.link
            and other.opened < session.opened < other.ended
        ]
        if len(older) < session.allowed:
            continue
        known = [_known_to(session, other, heard) for other in older]
        if any(moment is None for moment in known):
            continue
        # Those that ended meanwhile have made room: only as long as all lived was this one too many.
        moment = max(session.opened, *(each for each in known if each is not None))
        alive = [other for other in older if other.ended > moment]
        if len(alive) >= session.allowed and session.ended > moment:
            found.append(f"session {session.id} of {session.tenant} lived beside {len(alive)} others")
    return found


def _answered_twice(events: Sequence[Event]) -> list[str]:
    """Calls that have been answered more than once: a repeated call has an attempt of its own."""
    found, seen = [], set()
    for event in events:
        if event.name != "answered" or event.fields["call"] is None:
            continue
        call = (event.fields["link"], event.fields["kind"], tuple(event.fields["call"]))
        if call in seen:
            found.append(f"{call[1]} {list(call[2])} of link {call[0]} was answered again")
        seen.add(call)
    return found


def _answered_when_fenced(events: Sequence[Event]) -> list[str]:
    """Answers of sessions that had been ended because their link has a newer one."""
    found, fenced = [], set()
    for event in events:
        if event.name == "ended" and event.fields["why"] == "fenced":
            fenced.add(event.fields["session"])
        if event.name == "answered" and event.fields["session"] in fenced:
            found.append(f"session {event.fields['session']} answered {event.fields['kind']} after it was fenced")
    return found


def _known_to(session: Session, other: Session, heard: dict[int, list[float]]) -> float | None:
    """From when on the worker of a session knows of another session; None where it never learns of it."""
    since = max(session.opened, other.opened)
    if session.process == other.process:
        return since
    later = [moment for moment in heard.get(session.process, ()) if moment > since]
    return later[REPORTS - 1] if len(later) >= REPORTS else None
