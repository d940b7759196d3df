"""What is asked of the training process: each model's promises one after the other, in the order in which they came.

A promise is answered once, whatever crashes: a step or a load that the model's state on the disk has already is not
done again, and gradients that only a memory had are computed again (`isthmus.daemon.tinker.held_models`). So a gradient
is neither lost nor counted twice.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from isthmus.common.errors import IsthmusError, WorkerDiedError
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.disk_room import DiskRoom, taken
from isthmus.daemon.home import Home
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.tables import TinkerModel, TinkerPromise, TinkerSampler, TinkerWeights
from isthmus.daemon.tinker.held_models import HeldModels
from isthmus.daemon.tinker.promises import Promises, Told, told_json, told_refusal
from isthmus.daemon.tinker.refusal import RefusalError
from isthmus.daemon.tinker.saved_weights import SAMPLER_WEIGHTS, WEIGHTS, SavedWeights, path_of
from isthmus.daemon.tinker.tinker_patience import (
    DEFECT,
    LONGEST_PAUSE,
    MINE,
    MOST_DEATHS,
    MOST_FAILURES,
    Waits,
    pause_after,
    told_failure,
)
from isthmus.daemon.tinker.wire_bodies import PROTOBUF
from isthmus.daemon.workers.asking import WorkerError, WorkerProcess

MODULE = "isthmus.daemon.tinker.training_worker"

Also = Callable[[Session], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Done:
    """What a promise has come to.

    Attributes:
        told: Its answer.
        also: What is written at the same time.
        obsolete: Folders that nobody needs once that is written, but those who read them just now.
    """

    told: Told
    also: Also | None = None
    obsolete: list[Path] = field(default_factory=list)


class TrainingQueue:
    """The promises that train, of all models. All its methods are for one event loop.

    Args:
        settings: Of the daemon.
        home: Its home.
        database: Its database.
        room: What the home may still take.
        promises: What is to be done.
        weights: Where it is saved.
        worker: What trains.
    """

    def __init__(
        self,
        settings: DaemonSettings,
        home: Home,
        database: Database,
        room: DiskRoom,
        promises: Promises,
        weights: SavedWeights,
        worker: WorkerProcess,
    ) -> None:
        self._home, self._database, self._room = home, database, room
        self._promises, self._weights = promises, weights
        self._models = HeldModels(settings, home, database, promises, worker)
        self._turn = asyncio.Lock()  # the process answers one question at a time; who asks when it dies, is known
        self._news: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._obsolete: set[Path] = set()
        self.reasons: dict[str, str] = {}  # why a model's promises wait, by its id

    def wake(self, model: str) -> None:
        """Do what a model's promises ask, if nobody is at it already."""
        if (news := self._news.get(model)) is not None:
            news.set()
            return
        self._news[model] = asyncio.Event()
        task = asyncio.create_task(self._work(model))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def forget(self, model: str) -> None:
        """Free a model's memory once nothing else is computed."""
        task = asyncio.create_task(self._forget(model))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def _forget(self, model: str) -> None:
        async with self._turn:
            await self._models.forget(model)

    async def stop(self) -> None:
        """Stop asking, and end the process. What it was doing is done again after the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._models.stop()
        for folder in list(self._obsolete):
            await run_in_threadpool(self._remove, folder)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            asyncio.get_running_loop().call_exception_handler(
                {"message": "a model's promises stand still", "exception": error, "task": task}
            )

    async def _work(self, model: str) -> None:
        news = self._news[model]
        failing, failures = "", 0
        try:
            while True:
                news.clear()
                promise = None
                try:
                    promise = await run_in_threadpool(self._promises.next_of, model)
                    if promise is not None:
                        await self._do(model, promise)
                    elif not news.is_set():
                        return
                except Exception as error:  # it is logged, and tried again: the disk was full, say
                    name = "" if promise is None else promise.id
                    failures = failures + 1 if name == failing else 1
                    failing = name
                    log.exception("a defect met %s of model %s, for the %d. time", name, model, failures)
                    self._models.doubt(model)
                    if promise is not None and failures >= MOST_FAILURES:
                        await self._give_up(promise, failures, error)
                    await asyncio.sleep(pause_after(failures))
        finally:
            del self._news[model]
            self.reasons.pop(model, None)

    async def _give_up(self, promise: TinkerPromise, failures: int, error: Exception) -> None:
        """Refuse what has failed so often, if that can be written down."""
        try:
            await self._tell(promise, self._refused(promise, told_failure(failures, error)))
        except Exception:  # the next turn tries again
            log.exception("the refusal of %s could not be written", promise.id)

    async def _do(self, model: str, promise: TinkerPromise) -> None:
        """Do what a promise asks until there is an answer."""
        deaths, waits = 0, Waits()
        while True:
            try:
                async with self._turn:
                    done = await self._answer(model, promise)
                break
            except (WorkerDiedError, WorkerError) as error:
                if isinstance(error, WorkerDiedError) or error.code == DEFECT:
                    self._models.doubt(model)
                    deaths += 1
                    if deaths < MOST_DEATHS:
                        continue
                    why = RefusalError(f"the training process has died {deaths} times at it ({error})", "server")
                elif waits.passes(error):
                    self.reasons[model] = str(error)
                    await asyncio.sleep(waits.pause())
                    continue
                else:
                    why = RefusalError(str(error), "server" if error.code in MINE else "user")
            except RefusalError as error:
                why = error
            except IsthmusError as error:
                why = RefusalError(str(error), "server")
            done = self._refused(promise, told_refusal(why))
            break
        self.reasons.pop(model, None)
        await self._tell(promise, done)
        if promise.kind in {"optim_step", "load_weights"}:
            await run_in_threadpool(self._promises.forget_bodies, model)

    async def _tell(self, promise: TinkerPromise, done: _Done) -> None:
        await self._promises.tell(promise, done.told, done.also)
        for folder in done.obsolete:
            self._obsolete.add(folder)
            asyncio.get_running_loop().call_later(LONGEST_PAUSE, self._remove, folder)

    def _remove(self, folder: Path) -> None:
        self._obsolete.discard(folder)
        shutil.rmtree(folder, ignore_errors=True)

    async def _answer(self, model: str, promise: TinkerPromise) -> _Done:
        row = await run_in_threadpool(self._row, model)
        if row is None:
            raise RefusalError(f"there is no model {model} any more")
        saved = await self._models.hold(row, promise)
        values, number = promise.request, promise.number
        match promise.kind:
            case "create_model":
                return _Done(told_json({"model_id": model, "type": "create_model"}))
            case "forward_backward" | "forward":
                return _Done(Told(await self._models.forward_backward(model, promise), PROTOBUF))
            case "optim_step":
                await run_in_threadpool(self._room.room_for, 0)
                waiting = await run_in_threadpool(self._promises.to_repeat, model, saved, number)
                done, _ = await self._models.ask(
                    "optim_step", model=model, number=number, adam=values["adam"], calls=len(waiting)
                )
                self._models.is_saved(model, number)
                return _Done(told_json({"metrics": done["metrics"]}), _saving(model, number))
            case "load_weights":
                await self._load(row, promise)
                self._models.is_saved(model, number)
                told = told_json({"path": values["path"], "model_id": model, "type": "load_weights"})
                return _Done(told, _saving(model, number))
            case "save_weights" | "save_weights_for_sampler":
                return await self._save(row, promise)
        raise RefusalError(f"{promise.kind} is not known here", "server")

    async def _load(self, row: TinkerModel, promise: TinkerPromise) -> None:
        found = await run_in_threadpool(self._weights.needed, row.owner, promise.request["path"])
        optimizer = promise.request["optimizer"]
        if optimizer and found.kind != WEIGHTS:
            raise RefusalError(f"{found.path} has no optimizer state: load the weights alone, or others")
        folder = str(self._weights.folder(found))
        await self._models.ask("load", model=row.id, number=promise.number, folder=folder, optimizer=optimizer)

    async def _save(self, row: TinkerModel, promise: TinkerPromise) -> _Done:
        values = promise.request
        kind = WEIGHTS if promise.kind == "save_weights" else SAMPLER_WEIGHTS
        path = path_of(row.id, kind, values["name"])
        older = await run_in_threadpool(self._weights.find, row.owner, path)
        if older is not None and not values["overwrite"]:
            raise RefusalError(f"there are weights at {path} already: choose another name, or overwrite them")
        await run_in_threadpool(lambda: self._room.room_for(taken(self._home.tinker_model(row.id))))
        folder = await run_in_threadpool(self._weights.new_folder, promise)
        await self._models.ask("save", model=row.id, folder=str(folder), optimizer=kind == WEIGHTS)
        new = await run_in_threadpool(
            self._weights.row, row, kind, values["name"], folder, values["ttl"], values["labels"]
        )
        new.listed = values["sampler"] is None
        if new.listed:
            told = {"path": path, "type": promise.kind}
        else:
            told = {"sampling_session_id": values["sampler"], "type": promise.kind}

        obsolete: list[Path] = []

        def also(session: Session) -> None:
            # Others may be there that `find` does not show, as they have expired.
            of_path = TinkerWeights.path == path
            obsolete.extend(
                self._home.path / old for old in session.scalars(select(TinkerWeights.folder).where(of_path))
            )
            session.execute(delete(TinkerWeights).where(of_path))
            session.add(new)
            if values["sampler"] is not None:
                session.merge(
                    TinkerSampler(
                        id=values["sampler"],
                        owner=row.owner,
                        session=row.session,
                        base=row.base,
                        weights=path,
                        created_at=new.created_at,
                    )
                )

        return _Done(told_json(told), also, obsolete)

    def _row(self, model: str) -> TinkerModel | None:
        with self._database.reading() as session:
            return session.get(TinkerModel, model)

    def _refused(self, promise: TinkerPromise, told: Told) -> _Done:
        """A refusal: it leaves no model where the promise was to make one, and nothing that it has saved."""
        if promise.kind in {"save_weights", "save_weights_for_sampler"}:
            return _Done(told, obsolete=[self._home.tinker_weights(promise.id)])
        if promise.model is None or not promise.scope.startswith("session/"):
            return _Done(told)

        def also(session: Session) -> None:
            session.execute(delete(TinkerModel).where(TinkerModel.id == promise.model))

        return _Done(told, also, [self._home.tinker_model(promise.model)])


def _saving(model: str, number: int) -> Also:
    def also(session: Session) -> None:
        session.execute(update(TinkerModel).where(TinkerModel.id == model).values(saved=number))

    return also
