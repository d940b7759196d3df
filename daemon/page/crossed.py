"""What has crossed between this machine and its clouds, and which parts of a model live where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from isthmus.daemon.state.tables import BaseModel, Job, TinkerModel, Traffic

_COUNTERS = ("bytes_up", "bytes_down", "calls", "retries")


@dataclass(frozen=True, slots=True)
class Reached:
    """Whether a cloud was there when it was asked last; None before. And if it was not, why."""

    reachable: bool | None = None
    error: str | None = None


def crossed(
    session: Session, owner: str, *, clouds: Mapping[str, Reached], leasing: bool, now: datetime | None = None
) -> dict[str, Any]:
    """The answer of `/isthmus/v1/traffic`. Bytes are of sealed frames, of all owners: they are this machine's.

    Args:
        session: Of the database.
        owner: Who asks; `adapters` is about what is theirs.
        clouds: Those of daemon.toml.
        leasing: Whether models that are trained through Tinker's API have adapters in the cloud's layers, leased.
        now: The time; by default the clock's.
    """
    today = (now or datetime.now(UTC)).strftime("%Y-%m-%d")
    totals = _sums(session)
    models = {model.cloud: model for model in session.scalars(select(BaseModel).order_by(BaseModel.name))}
    return {
        "today": _total(_sums(session, today)),
        "total": _total(totals),
        "clouds": [
            {
                "name": name,
                **asdict(clouds.get(name, Reached())),
                **_parts(models.get(name)),
                **totals.get(name, dict.fromkeys(_COUNTERS, 0)),
            }
            for name in sorted({*clouds, *totals})
        ],
        "adapters": adapters_of(session, owner, leasing=leasing),
    }


def adapters_of(session: Session, owner: str, *, leasing: bool) -> str:
    """Where an owner's adapters have been.

    Returns:
        "here"; "seen", if some act inside the cloud's layers, so that the cloud can work out what they do; "leased", if
        it has the weights of some.
    """
    began = select(Job.id).where(Job.owner == owner, Job.started_at.is_not(None)).limit(1)
    leased = or_(
        _says(Job.spec["leased"].as_string(), "none"),
        Job.spec["lend_dead"].as_boolean().is_(True),
        Job.spec["plugged"].as_boolean().is_(True),
    )
    trained = select(TinkerModel.id).where(TinkerModel.owner == owner).limit(1)
    if session.scalar(began.where(leased)) or (leasing and session.scalar(trained)):
        return "leased"
    return "seen" if session.scalar(began.where(_says(Job.spec["sites"].as_string(), "none"))) else "here"


def _says(field: Any, default: str) -> Any:
    return field.is_not(None) & (field != default)


def _sums(session: Session, day: str | None = None) -> dict[str, dict[str, int]]:
    """The counters of each cloud, of one day or of all."""
    query = select(Traffic.cloud, *(func.sum(getattr(Traffic, name)) for name in _COUNTERS)).group_by(Traffic.cloud)
    if day is not None:
        query = query.where(Traffic.day == day)
    return {row[0]: dict(zip(_COUNTERS, map(int, row[1:]), strict=True)) for row in session.execute(query)}


def _total(sums: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    return {name: sum(one[name] for one in sums.values()) for name in _COUNTERS}


def _parts(model: BaseModel | None) -> dict[str, Any]:
    """The model that a cloud serves and how it is cut: so many first and last layers on the edge, of so many in all."""
    if model is None:
        return {"model": None, "plan": None}
    bottom, _, top = str(model.facts.get("plan", "")).partition(":")
    n_layers = model.facts.get("n_layers")
    if n_layers is None or not (bottom.isdecimal() and top.isdecimal()):
        return {"model": model.name, "plan": None}
    return {"model": model.name, "plan": {"n_layers": n_layers, "first": int(bottom), "last": int(top)}}
