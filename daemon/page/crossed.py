"""What has crossed between this machine and its clouds, and which parts of a model live where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from isthmus.daemon.adapter_places import Cut
from isthmus.daemon.state.crossings import COUNTERS
from isthmus.daemon.state.owners import FIRST
from isthmus.daemon.state.tables import BaseModel, Owner, Traffic


@dataclass(frozen=True, slots=True)
class Reached:
    """Whether a cloud was there when it was asked last; None before. And if it was not, why."""

    reachable: bool | None = None
    error: str | None = None


def crossed(
    session: Session, owner: Owner, *, clouds: Mapping[str, Reached], now: datetime | None = None
) -> dict[str, Any]:
    """The answer of `/isthmus/v1/traffic`.

    The counters are of sealed frames, of all owners: they are this machine's. Since they tell when somebody works, the
    first owner alone has them; the others have `today` and `total` of None, and clouds without counters.

    Args:
        session: Of the database.
        owner: Who asks; `adapters` says where theirs have been (`isthmus.daemon.adapter_places`).
        clouds: Those of daemon.toml.
        now: The time; by default the clock's.
    """
    today = (now or datetime.now(UTC)).strftime("%Y-%m-%d")
    counted = owner.name == FIRST
    totals = _sums(session) if counted else {}
    models = {model.cloud: model for model in session.scalars(select(BaseModel).order_by(BaseModel.name))}
    return {
        "today": _total(_sums(session, today)) if counted else None,
        "total": _total(totals) if counted else None,
        "clouds": [
            {
                "name": name,
                **asdict(clouds.get(name, Reached())),
                **_parts(models.get(name)),
                **(totals.get(name, dict.fromkeys(COUNTERS, 0)) if counted else {}),
            }
            for name in sorted({*clouds, *totals})
        ],
        "adapters": owner.adapters,
    }


def _sums(session: Session, day: str | None = None) -> dict[str, dict[str, int]]:
    """The counters of each cloud, of one day or of all."""
    query = select(Traffic.cloud, *(func.sum(getattr(Traffic, name)) for name in COUNTERS)).group_by(Traffic.cloud)
    if day is not None:
        query = query.where(Traffic.day == day)
    return {row[0]: dict(zip(COUNTERS, map(int, row[1:]), strict=True)) for row in session.execute(query)}


def _total(sums: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    return {name: sum(one[name] for one in sums.values()) for name in COUNTERS}


def _parts(model: BaseModel | None) -> dict[str, Any]:
    """The model that a cloud serves and how it is cut: so many first and last layers on the edge, of so many in all."""
    if model is None:
        return {"model": None, "plan": None}
    cut = Cut.of(model.facts)
    return {"model": model.name, "plan": None if cut is None else asdict(cut)}
