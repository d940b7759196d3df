"""What serves Tinker's API in a running daemon: its promises, and what answers them."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any, cast

from fastapi import Depends, FastAPI, Request
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from isthmus.daemon.state.crossings import add_traffic
from isthmus.daemon.state.tables import TinkerModel, TinkerPromise, TinkerSampler, TinkerSession, TinkerWeights
from isthmus.daemon.tinker.promises import NewPromise, Promises
from isthmus.daemon.tinker.sampling_queue import SamplingQueue
from isthmus.daemon.tinker.saved_weights import SavedWeights
from isthmus.daemon.tinker.training_queue import MODULE, TrainingQueue
from isthmus.daemon.web.context import Context
from isthmus.daemon.workers.answering import Answer
from isthmus.daemon.workers.asking import WorkerProcess

_DAY = 86400.0
_SWEEP_EVERY = 3600.0

log = logging.getLogger(__name__)


class _Trainer(WorkerProcess):
    """The process that trains, and a note of what has crossed to the clouds behind each of its answers."""

    def __init__(self, context: Context, module: str) -> None:
        super().__init__(["-m", module], context.home.trainer_log)
        self._database = context.database
        self._names = {config.cloud: name for name, config in context.settings.clouds.items()}

    async def ask(self, method: str, blob: bytes = b"", **values: Any) -> Answer:
        """See `WorkerProcess`. What a question that fails has sent is noted with the next answer."""
        answer = await super().ask(method, blob, **values)
        crossed, _ = await super().ask("traffic")
        if crossed["clouds"]:
            await run_in_threadpool(self._add, crossed["clouds"])
        return answer

    def _add(self, clouds: Mapping[str, Mapping[str, int]]) -> None:
        with self._database.session() as session:
            for cloud, counts in clouds.items():
                add_traffic(session, self._names[cloud], counts, time.time())


class TinkerService:
    """The parts behind the API's endpoints.

    Args:
        context: Of the daemon.
        module: What trains.
    """

    def __init__(self, context: Context, module: str = MODULE) -> None:
        worker = _Trainer(context, module)
        settings, home, database = context.settings, context.home, context.database
        self.context = context
        self.promises = Promises(database, home)
        self.weights = SavedWeights(database, home)
        self.training = TrainingQueue(settings, home, database, context.room, self.promises, self.weights, worker)
        self.sampling = SamplingQueue(settings, database, self.promises, self.weights, context.answers)
        self._sweeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take up what a stop or a crash has left."""
        await run_in_threadpool(self.promises.start)
        for promise in await run_in_threadpool(self.promises.unanswered):
            self._dispatch(promise)
        self._sweeping = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """End what was started."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        await self.sampling.stop()
        await self.training.stop()

    async def promise(self, new: NewPromise, also: Callable[[Session], None] | None = None) -> TinkerPromise:
        """Promise something, once, and have it done. Raises FullError."""
        made = await run_in_threadpool(self.promises.make, new, also)
        if made.answer is None:
            self._dispatch(made)
        return made

    def _dispatch(self, promise: TinkerPromise) -> None:
        if promise.kind == "asample":
            self.sampling.add(promise)
        elif promise.model is not None:
            self.training.wake(promise.model)

    async def _sweep(self) -> None:
        while True:
            try:
                await run_in_threadpool(self.sweep)
            except OSError as error:
                log.warning("what Tinker's API no longer needs could not be removed: %s", error)
            await asyncio.sleep(_SWEEP_EVERY)

    def sweep(self) -> None:
        """Remove what is kept no longer: old promises, models that nobody has asked for, expired weights.

        The database's file is as small as what stays, then.
        """
        before = time.time() - self.context.settings.keep_days * _DAY
        with self.context.database.session() as session:
            old = session.scalars(select(TinkerModel).where(TinkerModel.seen_at < before)).all()
            gone = [row.id for row in old if not _waits(session, row.id)]
            for row in old:
                if row.id in gone:
                    session.delete(row)
        for model in gone:
            shutil.rmtree(self.context.home.tinker_model(model), ignore_errors=True)
        self.promises.sweep(before)
        self.weights.sweep()
        self._sweep_sessions(before)
        self.context.database.shrink()

    def _sweep_sessions(self, before: float) -> None:
        """Remove samplers whose weights have gone, and sessions that have nothing any more."""
        with self.context.database.session() as session:
            there = set(session.scalars(select(TinkerWeights.path)))
            for sampler in session.scalars(select(TinkerSampler).where(TinkerSampler.created_at < before)):
                if sampler.weights is not None and sampler.weights not in there:
                    session.delete(sampler)
            used = set(session.scalars(select(TinkerModel.session)))
            for row in session.scalars(select(TinkerSession).where(TinkerSession.seen_at < before)):
                if row.id not in used:
                    for sampler in session.scalars(select(TinkerSampler).where(TinkerSampler.session == row.id)):
                        session.delete(sampler)
                    session.delete(row)


def _waits(session: Session, model: str) -> bool:
    query = select(TinkerPromise.id).where(TinkerPromise.model == model, TinkerPromise.answer.is_(None))
    return session.scalar(query.limit(1)) is not None


@asynccontextmanager
async def tinker_lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Have the service while the application runs; it is the application's `state.tinker`."""
    context = cast(Context, app.state.context)
    make: Callable[[Context], TinkerService] = getattr(app.state, "make_tinker", TinkerService)
    service: Any = make(context)
    app.state.tinker = service
    await service.start()
    try:
        yield
    finally:
        await service.stop()


def service_of(request: Request) -> TinkerService:
    """The service behind a request's application."""
    return cast(TinkerService, request.app.state.tinker)


Tinker = Annotated[TinkerService, Depends(service_of)]
