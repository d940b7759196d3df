"""Reads histories, and finds the time for which each session lived."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isthmus.common.errors import IsthmusError


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
