"""What is asked of the training process: each model's promises one after the other, in the order in which they came.

The process holds a model's gradients in its memory, and writes its state to the disk with every `optim_step`, under the
promise's number, and with every load. When the process, or the daemon, has died, a model is made from that state, and
the `forward_backward`s after it that had been answered are done again, without another answer. A step that the state
has already is answered as it was. So a gradient is neither lost nor counted twice. To free memory a model is forgotten
and made again in the same way.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from isthmus.common.errors import IsthmusError, WorkerDiedError
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.disk_room import DiskRoom, taken
from isthmus.daemon.home import Home
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.tables import BaseModel, TinkerModel, TinkerPromise, TinkerSampler, TinkerWeights
from isthmus.daemon.tinker.promises import Promises, Told, told_json, told_refusal
from isthmus.daemon.tinker.refusal import RefusalError
from isthmus.daemon.tinker.saved_weights import SAMPLER_WEIGHTS, WEIGHTS, SavedWeights, path_of
from isthmus.daemon.tinker.tinker_patience import LONGEST_PAUSE, MINE, MOST_FAILURES, passes, pause_after, told_failure
from isthmus.daemon.tinker.wire_bodies import PROTOBUF, BodyError, read_question, written_output
from isthmus.daemon.workers.asking import WorkerError, WorkerProcess

MODULE = "isthmus.daemon.tinker.training_worker"
_DEATHS = 3

Also = Callable[[Session], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Done:
    """What a promise has come to.

    Attributes:
        told: Its answer.
        also: What is written at the same time.
        obsolete: Folders that nobody needs once that is written.
    """

    told: Told
    also: Also | None = None
    obsolete: list[str] = field(default_factory=list)


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
        self._settings, self._home, self._database, self._room = settings, home, database, room
        self._promises, self._weights, self._worker = promises, weights, worker
        self._turn = asyncio.Lock()  # the process answers one question at a time; who asks when it dies, is known
        # The models that the process has, the last used one last, with the number of each one's state on the disk; None
        # for one that is made anew, since nobody knows what it holds.
        self._hot: OrderedDict[str, int | None] = OrderedDict()
        self._pid: int | None = None  # the process that has them
        self._news: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()
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
            if model in self._hot and self._worker.pid == self._pid:
                del self._hot[model]
                with suppress(WorkerDiedError):  # then it is free, too
                    await self._ask("forget", model=model)

    async def stop(self) -> None:
        """Stop asking, and end the process. What it was doing is done again after the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._worker.stop()

    def state_folder(self, model: str) -> Path:
        """Where a model's newest state is."""
        return self._home.tinker / "models" / model.replace(":", "-")

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
                    if model in self._hot:
                        self._hot[model] = None
                    if promise is not None and failures >= MOST_FAILURES:
                        await self._give_up(promise, failures, error)
                    await asyncio.sleep(pause_after(failures))
        finally:
            del self._news[model]
            self.reasons.pop(model, None)

    async def _give_up(self, promise: TinkerPromise, failures: int, error: Exception) -> None:
        """Refuse what has failed so often, if that can be written down."""
        try:
            await self._promises.tell(promise, told_failure(failures, error), _forgetting(promise))
        except Exception:  # the next turn tries again
            log.exception("the refusal of %s could not be written", promise.id)

    async def _do(self, model: str, promise: TinkerPromise) -> None:
        """Do what a promise asks until there is an answer."""
        deaths, tries = 0, 0
        while True:
            try:
                async with self._turn:
                    done = await self._answer(model, promise)
            except WorkerDiedError as error:
                deaths += 1
                if deaths < _DEATHS:
                    continue
                done = _refused(RefusalError(f"the training process has died {deaths} times at it ({error})", "server"))
            except WorkerError as error:
                tries += 1
                if passes(error, tries):
                    self.reasons[model] = str(error)
                    await asyncio.sleep(pause_after(tries))
                    continue
                done = _refused(RefusalError(str(error), "server" if error.code in MINE else "user"))
            except RefusalError as error:
                done = _refused(error)
            except BodyError as error:
                done = _refused(RefusalError(str(error)))
            except IsthmusError as error:
                done = _refused(RefusalError(str(error), "server"))
            break
        self.reasons.pop(model, None)
        await self._promises.tell(promise, done.told, done.also or _forgetting(promise))
        for folder in done.obsolete:
            # Somebody may be reading it; what a crash leaves goes at the next start.
            asyncio.get_running_loop().call_later(LONGEST_PAUSE, self._weights.remove_folder, folder)
        if promise.kind == "optim_step":
            await run_in_threadpool(self._promises.forget_bodies, model)

    async def _answer(self, model: str, promise: TinkerPromise) -> _Done:
        row = await run_in_threadpool(self._row, model)
        if row is None:
            raise RefusalError(f"there is no model {model} any more")
        saved = await self._make_ready(row, promise)
        values = promise.request
        match promise.kind:
            case "create_model":
                return _Done(told_json({"model_id": model, "type": "create_model"}), _nothing)
            case "forward_backward" | "forward":
                answer = await self._forward_backward(model, promise)
                body = await run_in_threadpool(written_output, answer["outputs"], answer["metrics"])
                return _Done(Told(body, PROTOBUF))
            case "optim_step":
                await run_in_threadpool(self._room.room_for, 0)
                waiting = await run_in_threadpool(self._promises.to_repeat, model, saved, promise.number)
                done = await self._ask(
                    "optim_step", model=model, number=promise.number, adam=values["adam"], calls=len(waiting)
                )
                self._hot[model] = promise.number
                return _Done(told_json({"metrics": done["metrics"]}), _saving(model, promise.number))
            case "load_weights":
                await self._load(model, row.owner, promise)
                told = told_json({"path": values["path"], "model_id": model, "type": "load_weights"})
                return _Done(told, _nothing)
            case "save_weights" | "save_weights_for_sampler":
                return await self._save(row, promise)
        raise RefusalError(f"{promise.kind} is not known here", "server")

    async def _make_ready(self, row: TinkerModel, promise: TinkerPromise) -> int:
        """Have the process hold a model as it was before a promise; the number that its state on the disk has."""
        if self._worker.pid is None or self._worker.pid != self._pid:
            self._hot.clear()
        if (number := self._hot.get(row.id)) is not None:
            self._hot.move_to_end(row.id)
            return number
        if row.id in self._hot:
            del self._hot[row.id]
            await self._ask("forget", model=row.id)
        while len(self._hot) >= self._settings.adapters_hot:
            oldest, _ = self._hot.popitem(last=False)
            await self._ask("forget", model=oldest)
        answer = await self._create(row, promise)
        if self._worker.pid != self._pid:
            self._hot.clear()
            self._pid = self._worker.pid
        saved = int(answer.get("saved") or 0)
        if saved < row.saved:
            raise RefusalError(f"the state of {row.id} on the disk is older than it must be: create another", "server")
        for earlier in await run_in_threadpool(self._promises.to_repeat, row.id, saved, promise.number):
            await self._forward_backward(row.id, earlier)
        self._hot[row.id] = saved
        return saved

    async def _create(self, row: TinkerModel, promise: TinkerPromise) -> dict[str, Any]:
        """Have the process make a model, or take it from the disk.

        To train attention, MLPs and the head is what the API's clients ask by default: then the head is left out where
        it is tied or elsewhere. Where it is asked for by itself, that is refused.
        """
        question = await run_in_threadpool(self._creation, row)
        new = promise.kind == "create_model"
        try:
            answer, _ = await self._worker.ask("create", **question)
        except WorkerError as error:
            all_of_it = question["attn"] and question["mlp"] and question["unembed"]
            if not (new and all_of_it and "train_unembed" in str(error)):
                raise
            answer, _ = await self._worker.ask("create", **question | {"unembed": False})
            await run_in_threadpool(self._leave_the_head, row.id)
        return answer

    def _leave_the_head(self, model: str) -> None:
        with self._database.session() as session:
            row = session.get_one(TinkerModel, model)
            row.settings = row.settings | {"train_unembed": False}

    async def _forward_backward(self, model: str, promise: TinkerPromise) -> dict[str, Any]:
        question = await run_in_threadpool(lambda: read_question(self._promises.body(promise)))
        return await self._ask("forward_backward", model=model, **question)

    async def _load(self, model: str, owner: str, promise: TinkerPromise) -> None:
        found = await run_in_threadpool(self._weights.needed, owner, promise.request["path"])
        optimizer = promise.request["optimizer"]
        if optimizer and found.kind != WEIGHTS:
            raise RefusalError(f"{found.path} has no optimizer state: load the weights alone, or others")
        await self._ask("load", model=model, folder=str(self._weights.folder(found)), optimizer=optimizer)

    async def _save(self, row: TinkerModel, promise: TinkerPromise) -> _Done:
        values = promise.request
        kind = WEIGHTS if promise.kind == "save_weights" else SAMPLER_WEIGHTS
        path = path_of(row.id, kind, values["name"])
        older = await run_in_threadpool(self._weights.find, row.owner, path)
        if older is not None and not values["overwrite"]:
            raise RefusalError(f"there are weights at {path} already: choose another name, or overwrite them")
        await run_in_threadpool(lambda: self._room.room_for(taken(self.state_folder(row.id))))
        folder = await run_in_threadpool(self._weights.new_folder, promise)
        await self._ask("save", model=row.id, folder=str(folder), optimizer=kind == WEIGHTS)
        new = await run_in_threadpool(
            self._weights.row, row, kind, values["name"], folder, values["ttl"], values["labels"]
        )
        new.listed = values["sampler"] is None
        if new.listed:
            told = {"path": path, "type": promise.kind}
        else:
            told = {"sampling_session_id": values["sampler"], "type": promise.kind}

        obsolete: list[str] = []

        def also(session: Session) -> None:
            # Others may be there that `find` does not show, as they have expired.
            of_path = TinkerWeights.path == path
            obsolete.extend(session.scalars(select(TinkerWeights.folder).where(of_path)))
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

    async def _ask(self, method: str, **values: Any) -> dict[str, Any]:
        """Ask the process that holds the models; another one, which took its place meanwhile, has none of them."""
        try:
            answer, _ = await self._worker.ask(method, **values)
        except WorkerError:
            if self._worker.pid != self._pid:
                raise WorkerDiedError("the training process has ended") from None
            raise
        if self._worker.pid != self._pid:
            raise WorkerDiedError("the training process has ended")
        return answer

    def _row(self, model: str) -> TinkerModel | None:
        with self._database.reading() as session:
            return session.get(TinkerModel, model)

    def _creation(self, row: TinkerModel) -> dict[str, Any]:
        """What the process is asked to make."""
        with self._database.reading() as session:
            base = session.get(BaseModel, row.base)
        cloud = None if base is None else self._settings.clouds.get(base.cloud)
        if cloud is None:
            raise RefusalError(f"no cloud of daemon.toml serves {row.base!r}")
        folder = self.state_folder(row.id)
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        lora = row.settings
        return {
            "model": row.id,
            "folder": str(folder),
            "cloud": cloud.model_dump(mode="json"),
            "rank": lora["rank"],
            "seed": lora["seed"],
            "attn": lora["train_attn"],
            "mlp": lora["train_mlp"],
            "unembed": lora["train_unembed"],
            "layers": lora["layers"],
        }


def _refused(error: RefusalError) -> _Done:
    return _Done(told_refusal(error))


def _nothing(_session: Session) -> None:
    pass


def _saving(model: str, number: int) -> Also:
    def also(session: Session) -> None:
        session.execute(update(TinkerModel).where(TinkerModel.id == model).values(saved=number))

    return also


def _forgetting(promise: TinkerPromise) -> Also | None:
    """What a refused promise leaves: no model where it was to make one."""
    if promise.kind not in {"create_model", "load_weights"} or not promise.scope.startswith("session/"):
        return None

    def also(session: Session) -> None:
        if (row := session.get(TinkerModel, promise.model)) is not None:
            session.delete(row)

    return also
