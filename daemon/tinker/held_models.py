"""The models that the training process has in its memory, and how one that it does not have is made again.

The process holds a model's gradients in its memory alone, and writes its state to the disk with every step and every
load, under the number of the promise that asked for it. A model is made from that state, and the `forward_backward`s
after it that were answered are done again, without another answer. So it is when the process or the daemon has died,
when a model was forgotten to free memory, and when nobody knows what the process holds of it.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from typing import Any

from starlette.concurrency import run_in_threadpool

from isthmus.common.errors import WorkerDiedError
from isthmus.daemon.adapter_places import LEASED
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.home import Home
from isthmus.daemon.state.crossings import note_adapters
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.tables import BaseModel, TinkerModel, TinkerPromise
from isthmus.daemon.tinker.promises import Promises
from isthmus.daemon.tinker.refusal import RefusalError
from isthmus.daemon.workers.answering import Answer
from isthmus.daemon.workers.asking import WorkerError, WorkerProcess


class HeldModels:
    """The models in the memory of the process that trains. It is asked one question at a time.

    Args:
        settings: Of the daemon.
        home: Its home.
        database: Its database.
        promises: Has the data of what is done again.
        worker: What trains.
    """

    def __init__(
        self, settings: DaemonSettings, home: Home, database: Database, promises: Promises, worker: WorkerProcess
    ) -> None:
        self._settings, self._home, self._database = settings, home, database
        self._promises, self._worker = promises, worker
        # The last used one last, with the number of each one's state on the disk; None for one to be made anew.
        self._held: OrderedDict[str, int | None] = OrderedDict()
        self._pid: int | None = None  # the process that has them

    async def hold(self, row: TinkerModel, promise: TinkerPromise) -> int:
        """Have the process hold a model as it was before a promise; the number that its state on the disk has.

        Raises:
            RefusalError: It cannot be made again.
            WorkerError: The process cannot make it.
            WorkerDiedError: The process has died.
        """
        if self._worker.pid is None or self._worker.pid != self._pid:
            self._held.clear()
        if (number := self._held.get(row.id)) is not None:
            self._held.move_to_end(row.id)
            return number
        if row.id in self._held:
            del self._held[row.id]
            await self.ask("forget", model=row.id)
        while len(self._held) >= self._settings.adapters_hot:
            oldest, _ = self._held.popitem(last=False)
            await self.ask("forget", model=oldest)
        answer = await self._create(row, promise)
        if self._worker.pid != self._pid:
            self._held.clear()
            self._pid = self._worker.pid
        saved = int(answer.get("saved") or 0)
        if not row.saved <= saved <= promise.number:
            age = "older" if saved < row.saved else "newer"
            why = f"the state of {row.id} on the disk is {age} than the daemon's database knows: create another"
            raise RefusalError(why, "server")
        for earlier in await run_in_threadpool(self._promises.to_repeat, row.id, saved, promise.number):
            await self.forward_backward(row.id, earlier)
        self._held[row.id] = saved
        return saved

    def is_saved(self, model: str, number: int) -> None:
        """Note that the state of a model on the disk is that after a promise."""
        self._held[model] = number

    def doubt(self, model: str) -> None:
        """Note that nobody knows what the process holds of a model: it is made again before it is used."""
        if model in self._held:
            self._held[model] = None

    async def forget(self, model: str) -> None:
        """Free a model's memory."""
        if model in self._held and self._worker.pid == self._pid:
            del self._held[model]
            with suppress(WorkerDiedError):  # then it is free, too
                await self.ask("forget", model=model)

    async def forward_backward(self, model: str, promise: TinkerPromise) -> bytes:
        """Do what a promise asks of a model that is held; its answer. Raises what `ask` does, and RefusalError."""
        body = await run_in_threadpool(self._promises.body, promise)
        _, answer = await self.ask("forward_backward", body, model=model)
        return answer

    async def ask(self, method: str, blob: bytes = b"", **values: Any) -> Answer:
        """Ask the process that holds the models; another one, which took its place meanwhile, has none of them.

        Raises:
            WorkerError: It cannot do it.
            WorkerDiedError: It has ended.
        """
        try:
            answer = await self._worker.ask(method, blob, **values)
        except WorkerError:
            if self._worker.pid != self._pid:
                raise WorkerDiedError("the training process has ended") from None
            raise
        if self._worker.pid != self._pid:
            raise WorkerDiedError("the training process has ended")
        return answer

    async def stop(self) -> None:
        """End the process."""
        await self._worker.stop()

    async def _create(self, row: TinkerModel, promise: TinkerPromise) -> dict[str, Any]:
        """Have the process make a model, or take it from the disk.

        To train attention, MLPs and the head is what the API's clients ask by default: then a head that is tied to the
        embedding is left out. Where it is asked for by itself, that is refused.
        """
        lora = row.settings
        spare = promise.kind == "create_model" and bool(lora["train_attn"] and lora["train_mlp"])
        answer, _ = await self._worker.ask(
            "create",
            model=row.id,
            folder=str(self._home.tinker_model(row.id)),
            cloud=await run_in_threadpool(self._cloud_for, row),
            rank=lora["rank"],
            seed=lora["seed"],
            attn=lora["train_attn"],
            mlp=lora["train_mlp"],
            unembed=lora["train_unembed"],
            layers=lora["layers"],
            spare_tied_head=spare,
        )
        if answer["unembed"] != lora["train_unembed"]:
            await run_in_threadpool(self._leave_the_head, row.id)
        return answer

    def _leave_the_head(self, model: str) -> None:
        with self._database.session() as session:
            row = session.get_one(TinkerModel, model)
            row.settings = row.settings | {"train_unembed": False}

    def _cloud_for(self, row: TinkerModel) -> dict[str, Any]:
        """The connection options of the cloud that serves a model's base, and a note of an adapter that it is leased.

        Raises RefusalError where no cloud serves it.
        """
        with self._database.session() as session:
            base = session.get(BaseModel, row.base)
            if row.settings["layers"] == "all" and (row.settings["train_attn"] or row.settings["train_mlp"]):
                note_adapters(session, row.owner, LEASED)
        cloud = None if base is None else self._settings.clouds.get(base.cloud)
        if cloud is None:
            raise RefusalError(f"no cloud of daemon.toml serves {row.base!r}")
        return cloud.model_dump(mode="json")
