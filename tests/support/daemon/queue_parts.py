"""The queues of Tinker's API, with stand-ins for what trains and what generates."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.disk_room import DiskRoom
from isthmus.daemon.home import Home
from isthmus.daemon.serving.answers import Piece, Prompt, Sampling, Target
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.tables import (
    BaseModel,
    Owner,
    TinkerModel,
    TinkerPromise,
    TinkerSampler,
    TinkerSession,
    TinkerWeights,
)
from isthmus.daemon.tinker.promises import NewPromise, Promises, Told
from isthmus.daemon.tinker.sampling_queue import SamplingQueue
from isthmus.daemon.tinker.saved_weights import SavedWeights
from isthmus.daemon.tinker.training_queue import TrainingQueue

SECONDS = 20.0


class FakeWorker:
    """Trains a number: it counts gradients in its memory, and writes their sum with a step."""

    def __init__(self) -> None:
        self.pid: int | None = 1
        self.models: dict[str, dict[str, int]] = {}
        self.disk: dict[str, dict[str, int]] = {}
        self.asked: list[str] = []
        self.errors: dict[str, list[Exception]] = {}
        self.loads = 0

    async def ask(self, method: str, blob: bytes = b"", **values: Any) -> tuple[dict[str, Any], bytes]:
        self.asked.append(method)
        model, written = values["model"], b""
        error = self.errors[method].pop(0) if self.errors.get(method) else None
        if error is not None and method != "forward_backward":
            raise error
        answer: dict[str, Any] = {}
        if method == "create":
            saved = self.disk.get(model)
            self.models[model] = {"sum": 0, "gradient": 0, "number": 0} | (saved or {})
            answer = {"unembed": values["unembed"], "saved": saved and saved["number"]}
        elif method == "forward_backward":
            self.models[model]["gradient"] += 1
            if error is not None:
                raise error  # when it has counted
            assert values == {"model": model}  # data are no JSON, which the daemon would be busy with
            written = b"the result of " + blob
        elif method == "optim_step":
            state = self.models[model]
            if state["number"] != values["number"]:
                assert state["gradient"] == values["calls"]
                state |= {"sum": state["sum"] + state["gradient"], "gradient": 0, "number": values["number"]}
                self.disk[model] = dict(state)
            answer = {"metrics": {}}
        elif method == "save":
            Path(values["folder"]).mkdir()
        elif method == "load":
            state = self.models[model]
            if state["number"] != values["number"]:
                state |= {"sum": 100, "gradient": 0, "number": values["number"]}
                self.disk[model] = dict(state)
                self.loads += 1
        elif method == "forget":
            del self.models[model]
        return answer, written

    async def stop(self) -> None:
        pass


class FakeAnswers:
    """Raises what it is given, for each owner, and then answers."""

    def __init__(self) -> None:
        self.errors: dict[str, list[Exception]] = {}
        self.owners: list[str] = []
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def generate(
        self, target: Target, prompt: Prompt, sampling: Sampling, *, owner: str = ""
    ) -> AsyncIterator[Piece]:
        self.owners.append(owner)
        await self.go_on.wait()
        if self.errors.get(owner):
            raise self.errors[owner].pop(0)
        yield Piece(0, "x", [1], [], "stop", 1)


class Parts:
    """The queues, on a database with an owner's model `m` and a sampler for each of two owners."""

    def __init__(self, folder: Path) -> None:
        self.home = Home.make(folder / "home")
        self.database = Database(self.home.database)
        settings = DaemonSettings.model_validate({"clouds": {"main": {"cloud": "isthmus://127.0.0.1:1#SHA256:0"}}})
        lora = dict.fromkeys(("rank", "seed", "train_attn", "train_mlp", "train_unembed", "layers"), 1)
        times = {"created_at": 0.0, "seen_at": 0.0}
        with self.database.session() as session:
            for name in ("a", "b"):
                session.add(Owner(id=name, name=name, token_sha256=name, created_at=0.0))
            session.add(BaseModel(name="base", cloud="main", facts={}, seen_at=0.0))
            session.flush()
            session.add(TinkerSession(id="s", owner="a", **times))
            session.flush()
            session.add(TinkerModel(id="m", owner="a", session="s", base="base", settings=lora, **times))
            for name in ("a", "b"):
                session.add(TinkerSampler(id=f"of-{name}", owner=name, session="s", base="base", created_at=0.0))
        self.promises = Promises(self.database, self.home)
        self.promises.start()
        self.weights = SavedWeights(self.database, self.home)
        self.worker, self.answers = FakeWorker(), FakeAnswers()
        room = DiskRoom(self.home.path, settings.disk_gib)
        self.training = TrainingQueue(
            settings,
            self.home,
            self.database,
            room,
            self.promises,
            self.weights,
            self.worker,  # type: ignore[arg-type]
        )
        self.sampling = SamplingQueue(settings, self.database, self.promises, self.weights, self.answers)  # type: ignore[arg-type]
        self.count = 0

    def make(self, kind: str, body: bytes | None = None, **request: Any) -> TinkerPromise:
        self.count += 1
        return self.promises.make(NewPromise("a", "model/m", str(self.count), kind, "m", request, body))

    async def train(self, kind: str, body: bytes | None = None, **request: Any) -> Told:
        made = self.make(kind, body, **request)
        self.training.wake("m")
        told = await self.promises.wait("a", made.id, SECONDS)
        assert told is not None
        return told

    async def save(self, *, overwrite: bool = False, ttl: int | None = None) -> Any:
        told = await self.train("save_weights", name="x", overwrite=overwrite, ttl=ttl, labels=None, sampler=None)
        return json.loads(told.body)

    def sample(self, owner: str) -> str:
        self.count += 1
        request = {
            "sampling_session_id": f"of-{owner}",
            "seq_id": self.count,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]},
            "sampling_params": {"max_tokens": 1},
        }
        made = self.promises.make(
            NewPromise(owner, f"of-{owner}", str(self.count), "asample", body=json.dumps(request).encode())
        )
        self.sampling.add(made)
        return made.id

    def rows(self) -> list[str]:
        with self.database.reading() as session:
            return [row.folder for row in session.query(TinkerWeights)]

    def write(self, change: Callable[[TinkerWeights], None]) -> None:
        with self.database.session() as session:
            change(session.query(TinkerWeights).one())


def run(parts: Parts, steps: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run steps while the queues are there."""

    async def all_of_it() -> None:
        try:
            await steps()
        finally:
            await parts.sampling.stop()
            await parts.training.stop()

    asyncio.run(all_of_it())
