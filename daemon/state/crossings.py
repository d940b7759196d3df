"""What has crossed to the clouds, as it is kept: bytes by cloud and day, and where an owner's adapters have been."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.orm import Session

from isthmus.daemon.adapter_places import PLACES
from isthmus.daemon.state.tables import Owner, Traffic

COUNTERS = ("bytes_up", "bytes_down", "calls", "retries")


def add_traffic(session: Session, cloud: str, counts: Mapping[str, int], at: float) -> None:
    """Add to a cloud's counters of a day (UTC).

    Args:
        counts: Each of `COUNTERS`.
        at: When it was, in seconds since 1970.
    """
    day = datetime.fromtimestamp(at, UTC).date().isoformat()
    added = {name: counts[name] for name in COUNTERS}
    sums = {name: getattr(Traffic, name) + count for name, count in added.items()}
    row = insert(Traffic).values(cloud=cloud, day=day, **added)
    session.execute(row.on_conflict_do_update(index_elements=["cloud", "day"], set_=sums))


def note_adapters(session: Session, owner: str, place: str) -> None:
    """Note that an adapter of an owner's is at a place of `PLACES`. What was noted before is never taken back."""
    row = session.get(Owner, owner)
    if row is not None and PLACES.index(place) > PLACES.index(row.adapters):
        row.adapters = place
