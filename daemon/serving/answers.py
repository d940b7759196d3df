"""What the APIs ask of the process that generates."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import ExitStack, aclosing, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import delete, select

from isthmus.common.errors import ConfigError, UnknownModelError, WorkerDiedError
from isthmus.daemon.adapter_places import LEASED, SEEN, Cut, acts_in_cloud
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.home import Home
from isthmus.daemon.serving.answer_forms import (
    MAX_NEW_TOKENS,
    Piece,
    Prompt,
    Sampling,
    Target,
    TokenChance,
    prompt_problem,
    prompt_tree,
)
from isthmus.daemon.serving.fair_turns import FairTurns, Shares
from isthmus.daemon.serving.unread_pieces import Unread
from isthmus.daemon.state.crossings import add_traffic, note_adapters
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.tables import BaseModel
from isthmus.daemon.workers.asking import WorkerError, WorkerProcess
from isthmus.daemon.workers.frames import Frame

__all__ = ["Answers", "BusyError", "Piece", "Prompt", "Sampling", "Target", "TokenChance"]

log = logging.getLogger("isthmus.daemon")

_LAST_SECONDS = 2.0
"""What the process has at its end to say what has crossed."""


class BusyError(Exception):
    """As many requests wait already as may."""


class Answers:
    """The process that generates, for one event loop.

    It is started when it is needed first, and anew when it has died; what it was answering then ends with
    `isthmus.common.errors.WorkerDiedError`.
    """

    def __init__(self, settings: DaemonSettings, home: Home, database: Database) -> None:
        self._settings, self._database = settings, database
        arguments = ["-m", "isthmus.daemon.serving.serving_worker"]
        greeting = Frame({"settings": settings.model_dump(mode="json")})
        self._worker = WorkerProcess(arguments, home.serving_log, greeting)
        self._turns = FairTurns(settings.answers_at_once)
        self._unread = Unread()
        self._requests = Shares(settings.answers_at_once + settings.answers_waiting)
        self._notes: set[asyncio.Task[None]] = set()
        self._looking: asyncio.Task[None] | None = None

    async def generate(
        self, target: Target, prompt: Prompt, sampling: Sampling, *, owner: str = ""
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of the answers as they come; to close the iterator ends them.

        They are computed however slowly they are read: what waits meanwhile has a bound (`Unread`), and an answer that
        goes beyond it ends with WorkerError.

        The same seed gives the same text whatever else is answered at the time, up to rounding: which calls a cloud
        computes together changes the last bits of its products (`isthmus edge generate --exact` says more).

        Args:
            owner: Who asks; owners take turns where several wait.

        Raises:
            BusyError: Too many wait, and the owner has his share of them.
            WorkerError: Whatever else is wrong, with its exit code (docs/exit-codes.md): 10 for a prompt that is empty
                or too long, 40 where the cloud is away.
        """
        if problem := sampling.problem() or prompt_problem(prompt):
            raise WorkerError(problem, ConfigError.exit_code)
        if not self._requests.take(owner):
            count = self._requests.taken.total()
            raise BusyError(f"{count} requests are being answered or wait: try again in a while")
        with ExitStack() as under_way:
            under_way.callback(self._count_down, owner)  # as the last answer is computed, or as this ends before
            base = await self._base(target.base)
            longest = int(base.facts["longest"])
            most = sampling.n * min(sampling.max_tokens or longest, longest)
            if most > MAX_NEW_TOKENS:
                raise WorkerError(
                    f"n = {sampling.n} answers may have {most} tokens: lower n or max_tokens, {MAX_NEW_TOKENS} are the "
                    "most for one request",
                    ConfigError.exit_code,
                )
            if target.adapter is not None:
                await asyncio.to_thread(self._note_adapter, owner, Path(target.adapter), base)
            values = {
                "cloud": base.cloud,
                "base": base.name,
                "adapter": target.adapter,
                "prompt": prompt_tree(prompt),
            }
            async with aclosing(self._merged(values, sampling, owner, under_way.close)) as pieces:
                async for piece in pieces:
                    yield piece

    async def tokenizer_files(self, base: str) -> Mapping[str, bytes]:
        """The files of a base model's tokenizer, by name, with its chat template. Raises what `generate` raises."""
        row = await self._base(base)
        values, blob = await self._worker.ask("tokenizer_files", cloud=row.cloud, base=row.name)
        return {name: blob[start:end] for name, start, end in values["files"]}

    async def look(self) -> None:
        """Ask every cloud of the settings what it serves, and note it (`BaseModel`). One that is away is left out.

        It also opens the link to a cloud that has come back. Of two clouds that serve a model of the same name, the
        first in the settings counts.
        """
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        await asyncio.shield(self._looking)  # whoever else waits for it still does

    async def state(self) -> Mapping[str, Any]:
        """For status and the page, of the process as it is; it is not started for that.

        Returns:
            `pid`, None where it does not run; `rss_bytes`; `hot`, folders of adapters in memory; `clouds`, each with
            `name`, `reachable` (None before it was asked), `model`, `error`, `since` and `until` (see
            `isthmus.daemon.serving.served_cloud.Seen`), `bytes_up` and `bytes_down` since the process has started, and
            `seen`, the three of them that do not tell whether an answer waits just now.
        """
        if self._worker.pid is None:
            unknown = dict.fromkeys(("reachable", "model", "error", "since", "until"))
            seen = dict.fromkeys(("reachable", "error", "since"))
            nothing = {**unknown, "bytes_up": 0, "bytes_down": 0, "seen": seen}
            clouds = [{"name": name, **nothing} for name in self._settings.clouds]
            return {"pid": None, "rss_bytes": 0, "hot": [], "clouds": clouds}
        values, _ = await self._worker.ask("state")
        return values

    async def stop(self) -> None:
        """End the process."""
        self._note_traffic_soon()
        if self._notes:
            await asyncio.wait(self._notes, timeout=_LAST_SECONDS)
        await self._worker.stop()
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)

    def _count_down(self, owner: str) -> None:
        self._requests.give_back(owner)
        self._note_traffic_soon()

    async def _merged(
        self, values: Mapping[str, Any], sampling: Sampling, owner: str, computed: Callable[[], None]
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of all answers, each of which waits for its own turn; `computed` is called behind the last one."""
        left = sampling.n

        async def answer(index: int) -> None:
            nonlocal left
            try:
                async with self._turns.turn(owner), aclosing(self._one(values, sampling, index)) as found:
                    while pieces.wanted and (piece := await anext(found, None)) is not None:
                        pieces.put(piece)
            except Exception as error:  # noqa: BLE001  # whoever reads the pieces gets it
                pieces.end(error)
            left -= 1
            if not left:
                pieces.end()
                computed()

        with closing(self._unread.request(owner)) as pieces:
            tasks = [asyncio.create_task(answer(index)) for index in range(sampling.n)]
            try:
                while (piece := await pieces.next()) is not None:
                    yield piece
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, values: Mapping[str, Any], sampling: Sampling, index: int) -> AsyncGenerator[Piece, None]:
        """The pieces of one answer."""
        seed = None if sampling.seed is None else (sampling.seed + index) % 2**63
        own = replace(sampling, n=1, seed=seed, prompt_logprobs=sampling.prompt_logprobs and not index)
        async with aclosing(self._worker.stream("generate", **values, sampling=own.to_tree())) as trees:
            async for tree, _ in trees:
                yield Piece.of_tree(index, tree)

    async def _look(self) -> None:
        values, _ = await self._worker.ask("look")
        await asyncio.to_thread(self._note_models, values["clouds"])
        self._note_traffic_soon()

    async def _base(self, name: str) -> BaseModel:
        """The row of a base model. Where there is none, and a cloud was never seen, the clouds are asked."""
        row, unseen = await asyncio.to_thread(self._row, name)
        if row is None and unseen:
            await self.look()
            row, _ = await asyncio.to_thread(self._row, name)
        if row is None or row.cloud not in self._settings.clouds:
            raise WorkerError(
                f"no cloud of daemon.toml serves {name!r}: choose a model of the list", UnknownModelError.exit_code
            )
        return row

    def _row(self, name: str) -> tuple[BaseModel | None, bool]:
        """The row of a base model, and whether a cloud of the settings has none."""
        with self._database.reading() as session:
            seen = set(session.scalars(select(BaseModel.cloud)))
            return session.get(BaseModel, name), not seen.issuperset(self._settings.clouds)

    def _note_adapter(self, owner: str, adapter: Path, base: BaseModel) -> None:
        """Note what the cloud learns of an adapter, before it does."""
        cut = Cut.of(base.facts)
        if cut is not None and acts_in_cloud(adapter, cut):
            with self._database.session() as session:
                note_adapters(session, owner, LEASED if self._settings.training_layers == "all" else SEEN)

    def _note_models(self, clouds: list[dict[str, Any]]) -> None:
        """Note what clouds serve, and forget what they do not serve any more."""
        now = time.time()
        with self._database.session() as session:
            session.execute(delete(BaseModel).where(BaseModel.cloud.not_in(list(self._settings.clouds))))
            seen: set[str] = set()
            for cloud in clouds:
                name = cloud["model"]
                session.execute(delete(BaseModel).where(BaseModel.cloud == cloud["name"], BaseModel.name != name))
                if name not in seen:
                    session.merge(BaseModel(name=name, cloud=cloud["name"], facts=cloud["facts"], seen_at=now))
                    session.flush()
                    seen.add(name)

    def _note_traffic_soon(self) -> None:
        if self._worker.pid is not None and len(self._notes) < 2:  # one that runs, and one that counts what comes then
            task = asyncio.create_task(self._note_traffic())
            self._notes.add(task)
            task.add_done_callback(self._traffic_noted)

    def _traffic_noted(self, task: asyncio.Task[None]) -> None:
        self._notes.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, WorkerDiedError):  # one that has died took its counts along
            log.warning("what has crossed to the clouds was not noted: %s: %s", type(error).__name__, error)

    async def _note_traffic(self) -> None:
        values, _ = await self._worker.ask("traffic")
        if values["clouds"]:
            await asyncio.to_thread(self._add_traffic, values["clouds"])

    def _add_traffic(self, clouds: Mapping[str, Mapping[str, int]]) -> None:
        with self._database.session() as session:
            for cloud, counts in clouds.items():
                add_traffic(session, cloud, counts, time.time())
