"""Saved weights: their `tinker://RUN/KIND/NAME` paths, their folders, and how long they stay."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from isthmus.daemon.disk_room import taken
from isthmus.daemon.home import Home
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.tables import TinkerModel, TinkerPromise, TinkerSampler, TinkerWeights, Tree
from isthmus.daemon.tinker.refusal import RefusalError

WEIGHTS, SAMPLER_WEIGHTS = "weights", "sampler_weights"
NEWEST_KEPT = 8
"""Nameless sampler weights of a model that always stay; of the older ones, those that were used within the hour."""
_IN_USE = 3600.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def path_of(model: str, kind: str, name: str) -> str:
    """Where weights are, for clients."""
    return f"tinker://{model}/{kind}/{name}"


def checked_name(name: str) -> str:
    """A name that may stand in a path. Raises RefusalError."""
    if not _NAME.fullmatch(name):
        raise RefusalError(f"{name!r} is no name for weights: up to 128 letters, digits, and . _ - inside")
    return name


class SavedWeights:
    """The saved weights of all owners. Its methods may be called by several threads."""

    def __init__(self, database: Database, home: Home) -> None:
        self._database, self._home = database, home
        self._used: dict[str, float] = {}

    def new_folder(self, promise: TinkerPromise) -> Path:
        """Where a promise saves; what an earlier try has left is removed."""
        folder = self._home.tinker_weights(promise.id)
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def row(
        self, model: TinkerModel, kind: str, name: str, folder: Path, ttl: int | None, labels: Tree
    ) -> TinkerWeights:
        """The row of weights that are in `folder`."""
        now = time.time()
        return TinkerWeights(
            path=path_of(model.id, kind, name),
            owner=model.owner,
            model=model.id,
            kind=kind,
            folder=str(folder.relative_to(self._home.path)),
            size=taken(folder),
            facts={"base": model.base, "settings": model.settings, "labels": labels},
            listed=True,
            expires_at=None if ttl is None else now + ttl,
            created_at=now,
        )

    def find(self, owner: str, path: str) -> TinkerWeights | None:
        """Weights of an owner."""
        with self._database.reading() as session:
            return _find(session, owner, path)

    def needed(self, owner: str, path: str) -> TinkerWeights:
        """Weights of an owner. Raises RefusalError where there are none."""
        with self._database.reading() as session:
            return _needed(session, owner, path)

    def folder(self, weights: TinkerWeights) -> Path:
        """Where weights are."""
        return self._home.path / weights.folder

    def use(self, path: str) -> None:
        """Note that somebody samples from weights."""
        self._used[path] = time.time()

    def of(self, owner: str, model: str | None = None) -> Sequence[TinkerWeights]:
        """The listed weights of an owner, or of a model of his, the newest first."""
        query = select(TinkerWeights).where(
            TinkerWeights.owner == owner,
            TinkerWeights.listed,
            or_(TinkerWeights.expires_at.is_(None), TinkerWeights.expires_at > time.time()),
        )
        if model is not None:
            query = query.where(TinkerWeights.model == model)
        with self._database.reading() as session:
            return session.scalars(query.order_by(TinkerWeights.created_at.desc())).all()

    def expire(self, owner: str, path: str, ttl: int | None) -> None:
        """Say when weights are removed. Raises RefusalError."""
        with self._database.session() as session:
            _needed(session, owner, path).expires_at = None if ttl is None else time.time() + ttl

    def delete(self, owner: str, path: str) -> None:
        """Remove weights. Raises RefusalError where there are none, or a model is to load them."""
        with self._database.session() as session:
            found = _needed(session, owner, path)
            if self._is_needed(session, path):
                raise RefusalError(f"a model is about to load {path}: delete it afterwards")
            session.delete(found)
        self.remove_folder(found.folder)

    def remove_folder(self, folder: str) -> None:
        """Remove a folder that no row has any more."""
        shutil.rmtree(self._home.path / folder, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what has expired, and nameless weights that nobody uses any more."""
        now = time.time()
        gone: list[TinkerWeights] = []
        with self._database.session() as session:
            rows = session.scalars(select(TinkerWeights).order_by(TinkerWeights.created_at.desc())).all()
            nameless: dict[str, int] = {}
            for row in rows:
                ended = row.expires_at is not None and row.expires_at <= now
                if not row.listed:
                    nameless[row.model] = nameless.get(row.model, 0) + 1
                    last = max(self._used.get(row.path, 0.0), row.created_at)
                    ended = nameless[row.model] > NEWEST_KEPT and last < now - _IN_USE
                    ended = ended or session.get(TinkerModel, row.model) is None
                if ended and not self._is_needed(session, row.path):
                    session.delete(row)
                    gone.append(row)
        for row in gone:
            self._used.pop(row.path, None)
            self.remove_folder(row.folder)

    @staticmethod
    def _is_needed(session: Session, path: str) -> bool:
        """Whether a model will load these weights."""
        query = select(TinkerPromise.id).where(
            TinkerPromise.kind == "load_weights",
            TinkerPromise.request["path"].as_string() == path,
            TinkerPromise.answer.is_(None),
        )
        return session.scalar(query.limit(1)) is not None


def samplers_of(session: Session, owner: str, in_session: str) -> Sequence[TinkerSampler]:
    """The samplers of a session."""
    query = select(TinkerSampler).where(TinkerSampler.owner == owner, TinkerSampler.session == in_session)
    return session.scalars(query.order_by(TinkerSampler.created_at)).all()


def _find(session: Session, owner: str, path: str) -> TinkerWeights | None:
    found = session.get(TinkerWeights, path)
    gone = found is None or found.owner != owner or (found.expires_at or time.time() + 1) < time.time()
    return None if gone else found


def _needed(session: Session, owner: str, path: str) -> TinkerWeights:
    if (found := _find(session, owner, path)) is None:
        raise RefusalError(f"there are no weights at {path}")
    return found
