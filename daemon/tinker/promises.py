"""Promises: requests that are answered later, each once, whatever crashes in between.

A request that is sent again finds its first promise. Its row, and its body where that has data or a prompt, are on the
disk before the client is told its number, and its answer before anybody is told that. Bodies of `forward_backward` stay
until the state that has their gradients is on the disk, since a crash loses what is not; others until the answer.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import and_, delete, func, or_, select, update
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.orm import Session, load_only
from starlette.concurrency import run_in_threadpool

from isthmus.common.files import write_atomic
from isthmus.daemon.home import Home
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.tables import TinkerModel, TinkerPromise
from isthmus.daemon.tinker.refusal import RefusalError

JSON = "application/json"
REFUSED = "application/problem+json"
"""The `answer_type` of a refusal, which is sent as JSON."""
MOST_WAITING = 1000
"""Promises of an owner that wait; the next are put off (429), and the client sends them again."""
MOST_KEPT = 100_000
"""Promises of an owner that are kept; beyond that the oldest that are answered go."""
MOST_HELD_BYTES = 1 << 30
"""Bytes of an owner's bodies that are kept."""
MOST_ANSWER_BYTES = 1 << 30
"""Bytes of an owner's answers that are kept; of older ones only that they were given."""

_NEVER = 2**62
_GRADIENTS = "forward_backward"
_UNTIL_ANSWERED = ("forward", "asample")
_WITH_BODY = (_GRADIENTS, *_UNTIL_ANSWERED)


class FullError(Exception):
    """As many promises wait as may: later there is room again."""


class UnknownPromiseError(LookupError):
    """There is no such promise of this owner."""


@dataclass(frozen=True, slots=True)
class Told:
    """An answer as it goes to the client."""

    body: bytes = field(repr=False)
    media_type: str


@dataclass(frozen=True, slots=True)
class NewPromise:
    """What a promise is made of; see `isthmus.daemon.state.tables.TinkerPromise`."""

    owner: str
    scope: str
    key: str
    kind: str
    model: str | None = None
    request: Mapping[str, Any] = field(default_factory=dict)
    body: bytes | None = None
    told: Told | None = None  # the answer, where it is known at once


def told_json(values: Mapping[str, Any]) -> Told:
    """A result in JSON."""
    return Told(json.dumps(values).encode(), JSON)


def told_refusal(error: RefusalError) -> Told:
    """A refusal."""
    return Told(json.dumps({"error": str(error), "category": error.category}).encode(), REFUSED)


class Promises:
    """The promises of all owners.

    `make` and the others without `async` may be called by several threads; `tell` and `wait` belong to the event loop.
    """

    def __init__(self, database: Database, home: Home) -> None:
        self._database = database
        self._home = home
        self._waiting: dict[str, set[asyncio.Event]] = {}

    def start(self) -> None:
        """Remove bodies that a crash has left and no promise needs any more."""
        over = select(TinkerPromise.id).outerjoin(TinkerModel, TinkerModel.id == TinkerPromise.model)
        with self._database.reading() as session:
            ids = session.scalars(over.where(TinkerPromise.kind.in_(_WITH_BODY), ~_needs_its_body())).all()
        self._remove_bodies(ids)

    def make(self, new: NewPromise, also: Callable[[Session], None] | None = None) -> TinkerPromise:
        """A promise, or the first one of the same scope and key.

        Args:
            new: What is promised.
            also: What else is written at the same time, if the promise is new.

        Raises:
            FullError: Too many wait.
        """
        made = TinkerPromise(
            id=f"req-{secrets.token_hex(16)}",
            owner=new.owner,
            model=new.model,
            scope=new.scope,
            key=new.key,
            kind=new.kind,
            request=dict(new.request),
            answer=None if new.told is None else new.told.body,
            answer_type=None if new.told is None else new.told.media_type,
            created_at=time.time(),
        )
        first = select(TinkerPromise).where(TinkerPromise.scope == new.scope, TinkerPromise.key == new.key)
        with self._database.reading() as session:
            if (found := session.scalar(first)) is not None:
                return found
            self._check_room(session, new)
        if new.body is not None:
            made.request = {"bytes": len(new.body)}
            write_atomic(self._home.tinker_request(made.id), new.body, mode=0o600)
        values = {
            column.key: getattr(made, column.key)
            for column in TinkerPromise.__table__.columns
            if column.key != "number"
        }
        try:
            with self._database.session() as session:
                over = _remove_oldest(session, new.owner)
                session.execute(insert(TinkerPromise).values(values).on_conflict_do_nothing())
                found = session.scalars(first).one()
                if found.id == made.id and also is not None:
                    also(session)
        except BaseException:
            self._remove_bodies([made.id])
            raise
        # The same request may have come twice at once.
        self._remove_bodies(over if found.id == made.id else [*over, made.id])
        return found

    def body(self, promise: TinkerPromise) -> bytes:
        """The body of a promise that has one. Raises RefusalError where it is lost."""
        try:
            return self._home.tinker_request(promise.id).read_bytes()
        except OSError as error:
            raise RefusalError(f"the data of {promise.id} cannot be read ({error.strerror})", "server") from error

    def next_of(self, model: str) -> TinkerPromise | None:
        """The oldest promise of a model that has no answer."""
        with self._database.reading() as session:
            return session.scalar(
                select(TinkerPromise)
                .where(TinkerPromise.model == model, TinkerPromise.answer.is_(None))
                .order_by(TinkerPromise.number)
                .limit(1)
            )

    def find(self, promise_id: str) -> TinkerPromise | None:
        """A promise of whomever."""
        with self._database.reading() as session:
            return session.scalar(select(TinkerPromise).where(TinkerPromise.id == promise_id))

    def unanswered(self) -> Sequence[TinkerPromise]:
        """All promises without an answer, in order: their ids, owners, kinds and models."""
        needed = load_only(TinkerPromise.id, TinkerPromise.owner, TinkerPromise.kind, TinkerPromise.model)
        rows = select(TinkerPromise).where(TinkerPromise.answer.is_(None)).order_by(TinkerPromise.number)
        with self._database.reading() as session:
            return session.scalars(rows.options(needed)).all()

    def to_repeat(self, model: str, saved: int, before: int) -> Sequence[TinkerPromise]:
        """Answered promises whose gradients are in no state on the disk, in order.

        Args:
            model: Whose.
            saved: The number that its state on the disk has: that of its newest step or load.
            before: The number of the promise that comes next.
        """
        with self._database.reading() as session:
            return session.scalars(
                select(TinkerPromise)
                .where(
                    TinkerPromise.model == model,
                    TinkerPromise.kind == _GRADIENTS,
                    TinkerPromise.number > saved,
                    TinkerPromise.number < before,
                    TinkerPromise.answer_type != REFUSED,
                )
                .order_by(TinkerPromise.number)
                .options(load_only(TinkerPromise.id, TinkerPromise.number, TinkerPromise.kind, TinkerPromise.request))
            ).all()

    async def tell(self, promise: TinkerPromise, told: Told, also: Callable[[Session], None] | None = None) -> None:
        """Answer a promise, durably, and wake who waits for it.

        Args:
            promise: One without an answer.
            told: The answer.
            also: What else is written at the same time.
        """
        await run_in_threadpool(self._write, promise, told, also)
        for event in self._waiting.pop(promise.id, ()):
            event.set()

    async def wait(self, owner: str, promise_id: str, seconds: float) -> Told | None:
        """The answer of a promise, once it is there; None if it is not after `seconds`. Raises UnknownPromiseError."""
        event = asyncio.Event()
        waiting = self._waiting.setdefault(promise_id, set())
        waiting.add(event)  # before the first look, so that an answer after it is noticed
        try:
            found = await run_in_threadpool(self._answer, owner, promise_id)
            if found is None:
                async with asyncio.timeout(seconds):
                    await event.wait()
                found = await run_in_threadpool(self._answer, owner, promise_id)
            return found
        except TimeoutError:
            return None
        finally:
            waiting.discard(event)
            if not waiting and self._waiting.get(promise_id) is waiting:
                del self._waiting[promise_id]

    def forget_bodies(self, model: str) -> None:
        """Remove the bodies of a model that neither an answer nor a repetition needs any more."""
        of_model = select(TinkerPromise.id).join(TinkerModel, TinkerModel.id == TinkerPromise.model)
        with self._database.reading() as session:
            ids = session.scalars(
                of_model.where(TinkerPromise.model == model, TinkerPromise.kind == _GRADIENTS, ~_needs_its_body())
                .order_by(TinkerPromise.number.desc())
                .limit(MOST_WAITING * 4)
            ).all()
        self._remove_bodies(ids)

    def sweep(self, before: float) -> None:
        """Remove promises that were made before a time and are answered, and the answers that are beyond the bound."""
        with self._database.session() as session:
            over = session.scalars(
                delete(TinkerPromise)
                .where(
                    TinkerPromise.id.in_(
                        select(TinkerPromise.id)
                        .outerjoin(TinkerModel, TinkerModel.id == TinkerPromise.model)
                        .where(TinkerPromise.created_at < before, ~_needs_its_body())
                    )
                )
                .returning(TinkerPromise.id)
            ).all()
            size = func.length(TinkerPromise.answer)
            sums = select(
                TinkerPromise.number,
                size.label("size"),
                func.sum(size)
                .over(partition_by=TinkerPromise.owner, order_by=TinkerPromise.number.desc())
                .label("sum"),
            ).subquery()
            gone = told_refusal(RefusalError("this answer was given, and is no longer kept", "server"))
            session.execute(
                update(TinkerPromise)
                .where(
                    TinkerPromise.number.in_(
                        select(sums.c.number).where(sums.c["sum"] > MOST_ANSWER_BYTES, sums.c.size > len(gone.body))
                    ),
                    # Whether its gradients count is known by its answer's type alone.
                    TinkerPromise.answer_type != REFUSED,
                )
                .values(answer=gone.body)
            )
        self._remove_bodies(over)

    def _remove_bodies(self, ids: Iterable[str]) -> None:
        for promise_id in ids:
            self._home.tinker_request(promise_id).unlink(missing_ok=True)

    def _answer(self, owner: str, promise_id: str) -> Told | None:
        with self._database.reading() as session:
            row = session.execute(
                select(TinkerPromise.answer, TinkerPromise.answer_type).where(
                    TinkerPromise.id == promise_id, TinkerPromise.owner == owner
                )
            ).one_or_none()
        if row is None:
            raise UnknownPromiseError(promise_id)
        if row.answer is None:
            return None
        refused = row.answer_type == REFUSED or row.answer.startswith(b'{"error"')
        return Told(row.answer, JSON if refused else row.answer_type)

    def _write(self, promise: TinkerPromise, told: Told, also: Callable[[Session], None] | None) -> None:
        with self._database.session() as session:
            values: dict[str, Any] = {"answer": told.body, "answer_type": told.media_type}
            session.execute(
                update(TinkerPromise)
                .where(TinkerPromise.id == promise.id, TinkerPromise.answer.is_(None))
                .values(values)
            )
            if also is not None:
                also(session)
        if promise.kind in _UNTIL_ANSWERED or (promise.kind == _GRADIENTS and told.media_type == REFUSED):
            self._remove_bodies([promise.id])

    def _check_room(self, session: Session, new: NewPromise) -> None:
        waiting = session.scalar(
            select(func.count()).where(TinkerPromise.owner == new.owner, TinkerPromise.answer.is_(None))
        )
        if (waiting or 0) >= MOST_WAITING:
            raise FullError(f"{waiting} requests wait already: ask again when some are done")
        if new.body is None:
            return
        held = session.scalar(
            select(func.sum(TinkerPromise.request["bytes"].as_integer()))
            .outerjoin(TinkerModel, TinkerModel.id == TinkerPromise.model)
            .where(TinkerPromise.owner == new.owner, TinkerPromise.kind.in_(_WITH_BODY), _needs_its_body())
        )
        if (held or 0) + len(new.body) > MOST_HELD_BYTES:
            raise FullError(
                f"{held} bytes of data and prompts wait already: make an optim_step, or wait for answers, and send "
                "these again"
            )


def _remove_oldest(session: Session, owner: str) -> Sequence[str]:
    """Make room for one more promise of an owner; returns the ids of those that were removed for it.

    They are no longer known if their requests come again.
    """
    own = TinkerPromise.owner == owner
    kept = session.scalar(select(func.count(TinkerPromise.number)).where(own)) or 0
    if kept < MOST_KEPT:
        return []
    oldest = (
        select(TinkerPromise.id)
        .outerjoin(TinkerModel, TinkerModel.id == TinkerPromise.model)
        .where(own, ~_needs_its_body())
        .order_by(TinkerPromise.number)
        .limit(kept - MOST_KEPT + 1)
    )
    ids = session.scalars(oldest).all()
    if len(ids) <= kept - MOST_KEPT:
        raise FullError(f"{kept} requests are kept for their optim_step: make one, and send this again")
    session.execute(delete(TinkerPromise).where(TinkerPromise.id.in_(ids)))
    return ids


def _needs_its_body() -> Any:
    """Whether a promise has no answer yet, or gradients that its model's state on the disk lacks."""
    return or_(
        TinkerPromise.answer.is_(None),
        and_(
            TinkerPromise.kind == _GRADIENTS,
            TinkerPromise.answer_type != REFUSED,
            TinkerPromise.number > func.coalesce(TinkerModel.saved, _NEVER),  # a model that is gone needs nothing
        ),
    )
