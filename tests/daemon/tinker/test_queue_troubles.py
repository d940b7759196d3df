"""What the queues do where a worker, the disk or the cloud fails: nothing stands still, and nothing counts twice."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from isthmus.common.errors import (
    CheckpointError,
    CloudFailedError,
    ConfigError,
    DiskError,
    DrainingError,
    OverQuotaError,
    RefusedError,
    TooLateError,
    TooManySessionsError,
)
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.disk_room import DiskRoom
from isthmus.daemon.home import Home
from isthmus.daemon.jobs import job_worker
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
from isthmus.daemon.tinker import tinker_patience, training_queue
from isthmus.daemon.tinker.promises import NewPromise, Promises, Told
from isthmus.daemon.tinker.refusal import RefusalError
from isthmus.daemon.tinker.sampling_queue import AT_ONCE, SamplingQueue
from isthmus.daemon.tinker.saved_weights import SavedWeights
from isthmus.daemon.tinker.training_queue import TrainingQueue
from isthmus.daemon.workers.asking import WorkerError

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


@pytest.mark.parametrize(
    ("lora", "place"),
    [
        ({"layers": "all", "train_attn": True, "train_mlp": False}, "leased"),
        ({"layers": "all", "train_attn": False, "train_mlp": True}, "leased"),
        ({"layers": "all", "train_attn": False, "train_mlp": False}, "here"),  # the head alone
        ({"layers": "edge", "train_attn": True, "train_mlp": True}, "here"),
    ],
)
def test_that_an_adapter_is_leased_is_noted_before_it_is_made(parts: Parts, lora: dict[str, Any], place: str) -> None:
    def places() -> dict[str, str]:
        with parts.database.reading() as session:
            return {owner.id: owner.adapters for owner in session.query(Owner)}

    with parts.database.session() as session:
        row = session.query(TinkerModel).one()
        row.settings = row.settings | lora
    assert places() == {"a": "here", "b": "here"}
    seen: list[dict[str, str]] = []
    ask = parts.worker.ask

    async def noticing(method: str, blob: bytes = b"", **values: Any) -> tuple[dict[str, Any], bytes]:
        seen.append(places())
        return await ask(method, blob, **values)

    parts.worker.ask = noticing  # type: ignore[method-assign]

    async def steps() -> None:
        await parts.train("create_model")

    run(parts, steps)
    assert seen[0] == {"a": place, "b": "here"}


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    monkeypatch.setattr(tinker_patience, "FIRST_PAUSE", 0.0)
    return Parts(tmp_path)


def run(parts: Parts, steps: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run steps while the queues are there."""

    async def all_of_it() -> None:
        try:
            await steps()
        finally:
            await parts.sampling.stop()
            await parts.training.stop()

    asyncio.run(all_of_it())


def test_weights_that_have_expired_give_their_name_free(parts: Parts) -> None:
    async def steps() -> None:
        assert "path" in await parts.save(ttl=1000)
        assert "choose another name" in (await parts.save())["error"]  # the control: they have not expired
        first = parts.rows()
        parts.write(lambda row: setattr(row, "expires_at", time.time() - 1))
        assert "path" in await parts.save()
        assert len(parts.rows()) == 1
        assert parts.rows() != first

    run(parts, steps)


def test_weights_that_are_deleted_while_others_take_their_name(parts: Parts) -> None:
    async def steps() -> None:
        path = (await parts.save())["path"]
        ask = parts.worker.ask

        async def meanwhile(method: str, blob: bytes = b"", **values: Any) -> Any:
            if method == "save":
                parts.weights.delete("a", path)
            return await ask(method, blob, **values)

        parts.worker.ask = meanwhile  # type: ignore[method-assign]
        assert "path" in await parts.save(overwrite=True)
        assert len(parts.rows()) == 1

    run(parts, steps)


def test_weights_that_are_deleted_twice_at_once_are_not_there_for_one_of_them(parts: Parts) -> None:
    found: list[str] = []

    def delete(path: str) -> None:
        try:
            parts.weights.delete("a", path)
            found.append("deleted")
        except RefusalError as error:
            found.append(str(error))
        except Exception as error:  # noqa: BLE001  # a defect, which the test tells
            found.append(repr(error))

    async def steps() -> None:
        path = (await parts.save())["path"]
        threads = [threading.Thread(target=delete, args=(path,)) for _ in range(2)]
        with parts.database.session():
            for thread in threads:
                thread.start()
            while parts.database._open_blocks < 3:  # until both wait for this one
                time.sleep(0.01)
        for thread in threads:
            thread.join()
        assert sorted(found) == ["deleted", f"there are no weights at {path}"]

    run(parts, steps)


def _failing_tell(parts: Parts, times: int) -> Callable[..., Awaitable[None]]:
    tell, left = parts.promises.tell, [times]

    async def failing(*arguments: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise DiskError("the disk is full")
        await tell(*arguments)

    return failing


def test_the_older_folder_goes_after_the_newer_row_is_there(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_queue, "LONGEST_PAUSE", 0.0)

    async def steps() -> None:
        await parts.save()
        (older,) = parts.rows()
        left = []

        async def looked(*arguments: Any) -> None:
            await asyncio.sleep(0.05)  # what was put off for no time has been done after this
            left.append((parts.home.path / older).exists())
            await tell(*arguments)

        tell, parts.promises.tell = parts.promises.tell, looked  # type: ignore[method-assign]
        await parts.save(overwrite=True)
        await asyncio.sleep(0.05)
        assert left == [True]
        assert not (parts.home.path / older).exists()  # the control: it does go

    run(parts, steps)


def test_data_and_results_pass_through_the_daemon_as_bytes(parts: Parts) -> None:
    async def steps() -> None:
        told = await parts.train("forward_backward", b"the data")
        assert told == Told(b"the result of the data", "application/x-protobuf")

    run(parts, steps)


@pytest.mark.parametrize("where", ["worker", "tell"])
def test_a_defect_doubles_no_gradient(parts: Parts, where: str) -> None:
    async def steps() -> None:
        await parts.train("forward_backward", b"1")
        if where == "worker":
            parts.worker.errors["forward_backward"] = [OSError("no process"), OSError("no process")]
        else:
            parts.promises.tell = _failing_tell(parts, 2)  # type: ignore[method-assign]
        assert b"error" not in (await parts.train("forward_backward", b"2")).body
        assert parts.worker.asked.count("forward_backward") >= 5  # some were done again
        await parts.train("optim_step", adam={})
        assert parts.worker.disk["m"]["sum"] == 2

    run(parts, steps)


def test_a_promise_that_meets_a_defect_always_is_refused_and_the_next_is_done(parts: Parts) -> None:
    async def steps() -> None:
        parts.worker.errors["forward_backward"] = [KeyError("a secret")] * tinker_patience.MOST_FAILURES
        refusal = json.loads((await parts.train("forward_backward", b"1")).body)
        assert refusal["category"] == "server"
        assert "has failed 3 times here (KeyError)" in refusal["error"]
        assert "secret" not in refusal["error"]
        await parts.train("forward_backward", b"2")
        await parts.train("optim_step", adam={})
        assert parts.worker.disk["m"]["sum"] == 1

    run(parts, steps)


def test_samples_outlive_defects(parts: Parts) -> None:
    async def steps() -> None:
        for times, refused in ((2, False), (3, True)):
            parts.answers.errors["a"] = [OSError("no process")] * times
            told = await parts.promises.wait("a", parts.sample("a"), SECONDS)
            assert told is not None
            assert (b"has failed 3 times" in told.body) is refused
        assert await parts.promises.wait("a", parts.sample("a"), SECONDS) is not None

    run(parts, steps)


def test_an_owner_is_told_why_his_own_samples_wait(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinker_patience, "FIRST_PAUSE", 30.0)

    async def steps() -> None:
        count = AT_ONCE + 1  # as many as would leave no place for another owner
        parts.answers.errors["a"] = [WorkerError("the cloud of a is away", 40, "UnreachableError")] * count
        waits = [parts.sample("a") for _ in range(count)]
        async with asyncio.timeout(SECONDS):
            while len(parts.sampling.reasons) < count:
                await asyncio.sleep(0.01)
        other = parts.sample("b")
        assert await parts.promises.wait("b", other, SECONDS) is not None
        assert parts.sampling.reasons == dict.fromkeys(waits, "the cloud of a is away")
        assert parts.answers.owners == ["a"] * count + ["b"]

    run(parts, steps)


def test_owners_take_turns_in_sampling(parts: Parts) -> None:
    async def steps() -> None:
        parts.answers.go_on.clear()
        made = [("a", parts.sample("a")) for _ in range(AT_ONCE + 3)]
        async with asyncio.timeout(SECONDS):
            while len(parts.answers.owners) < AT_ONCE:
                await asyncio.sleep(0.01)
        made += [("b", parts.sample("b")) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert parts.answers.owners == ["a"] * AT_ONCE  # the control: all places are taken
        parts.answers.go_on.set()
        for owner, promise in made:
            assert await parts.promises.wait(owner, promise, SECONDS) is not None
        assert sorted(parts.answers.owners[AT_ONCE : AT_ONCE + 2]) == ["a", "b"]
        assert sorted(parts.answers.owners[AT_ONCE + 2 : AT_ONCE + 4]) == ["a", "b"]

    run(parts, steps)


@pytest.mark.parametrize("errors", [[], [WorkerError("the cloud is away", 40, "UnreachableError")]])
def test_a_sample_that_is_asked_for_again_is_computed_once(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, errors: list[Exception]
) -> None:
    """Also while it is put off."""
    monkeypatch.setattr(tinker_patience, "FIRST_PAUSE", 0.1)

    async def steps() -> None:
        parts.answers.errors["a"] = list(errors)
        parts.answers.go_on.clear()
        promise = parts.promises.find(parts.sample("a"))
        assert promise is not None
        parts.sampling.add(promise)  # it waits
        async with asyncio.timeout(SECONDS):
            while not parts.answers.owners:
                await asyncio.sleep(0.01)
        parts.sampling.add(promise)  # it is under way
        parts.answers.go_on.set()
        async with asyncio.timeout(SECONDS):
            while errors and not parts.sampling.reasons:
                await asyncio.sleep(0.01)
        parts.sampling.add(promise)  # it is put off
        assert await parts.promises.wait("a", promise.id, SECONDS) is not None
        async with asyncio.timeout(SECONDS):
            while parts.sampling._tasks:
                await asyncio.sleep(0.01)
        parts.sampling.add(promise)  # it has its answer
        async with asyncio.timeout(SECONDS):
            while parts.sampling._tasks:
                await asyncio.sleep(0.01)
        assert len(parts.answers.owners) == 1 + len(errors)
        assert parts.sampling.reasons == {}

    run(parts, steps)


def test_the_same_passes_for_jobs() -> None:
    passing = {*tinker_patience.WAITS, *tinker_patience.MAY_PASS}
    assert passing == {*job_worker._PASSING, TooManySessionsError}
    assert issubclass(TooManySessionsError, job_worker._PASSING)
    for kind in passing:
        assert tinker_patience.Waits().passes(WorkerError("", kind.exit_code, kind.__name__))
    for other in (ConfigError, CheckpointError, DiskError, RefusedError, TooLateError):
        assert not tinker_patience.Waits().passes(WorkerError("", other.exit_code, other.__name__))


@pytest.mark.parametrize(
    ("kind", "times", "refused"),
    [
        (OverQuotaError, 4, False),
        (OverQuotaError, 5, True),
        (CloudFailedError, 5, True),
        (TooManySessionsError, 300, False),
        (DrainingError, 300, False),
        (RefusedError, 1, True),
    ],
)
def test_what_a_cloud_declines_waits_as_long_as_it_may_pass(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, kind: type[RefusedError], times: int, refused: bool
) -> None:
    monkeypatch.setattr(tinker_patience, "MOST_REFUSED", 5)

    async def steps() -> None:
        declined = [WorkerError("the cloud declines", 42, kind.__name__)] * times
        parts.worker.errors["save"], parts.answers.errors["a"] = list(declined), list(declined)
        assert ("error" in await parts.save()) is refused
        told = await parts.promises.wait("a", parts.sample("a"), SECONDS)
        assert told is not None
        assert (b"the cloud declines" in told.body) is refused

    run(parts, steps)


@pytest.mark.parametrize(("declined", "refused"), [(4, False), (5, True)])
def test_waits_for_a_cloud_that_is_away_do_not_count_as_declined(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, declined: int, refused: bool
) -> None:
    monkeypatch.setattr(tinker_patience, "MOST_REFUSED", 5)

    async def steps() -> None:
        errors: list[Exception] = [WorkerError("the cloud is away", 40, "UnreachableError")] * 20
        errors += [WorkerError("the cloud declines", 42, "OverQuotaError")] * declined
        parts.worker.errors["save"], parts.answers.errors["a"] = list(errors), list(errors)
        assert ("error" in await parts.save()) is refused
        told = await parts.promises.wait("a", parts.sample("a"), SECONDS)
        assert told is not None
        assert (b"error" in told.body) is refused

    run(parts, steps)


def test_the_pauses_grow_to_half_a_minute() -> None:
    pauses = [tinker_patience.pause_after(tries) for tries in (1, 2, 3, 6, 300)]
    assert pauses == [1.0, 2.0, 4.0, 30.0, 30.0]


def test_a_model_is_told_why_its_promises_wait(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinker_patience, "FIRST_PAUSE", 30.0)

    async def steps() -> None:
        parts.worker.errors["create"] = [WorkerError("4 sessions are open, 4 are allowed", 42, "TooManySessionsError")]
        parts.make("forward_backward", b"1")
        parts.training.wake("m")
        async with asyncio.timeout(SECONDS):
            while "m" not in parts.training.reasons:
                await asyncio.sleep(0.01)
        assert parts.training.reasons == {"m": "4 sessions are open, 4 are allowed"}

    run(parts, steps)


@pytest.mark.parametrize("where", ["tell", "defect"])
def test_a_load_is_made_once_and_forgets_gradients_for_ever(parts: Parts, where: str) -> None:
    async def steps() -> None:
        path = (await parts.save())["path"]
        await parts.train("forward_backward", b"1")
        if where == "tell":
            parts.promises.tell = _failing_tell(parts, 2)  # type: ignore[method-assign]
        await parts.train("load_weights", path=path, optimizer=False)
        assert parts.worker.loads == 1  # the state on the disk has it, although nobody was told
        parts.promises.sweep(time.time() + 1)  # the load's promise is forgotten, too
        if where == "defect":
            parts.worker.errors["forward_backward"] = [WorkerError("internal error", 1)]
        await parts.train("forward_backward", b"2")
        await parts.train("optim_step", adam={})
        assert parts.worker.disk["m"]["sum"] == 101

    run(parts, steps)


@pytest.mark.parametrize(("number", "age"), [(100, "newer"), (1, "older"), (2, None)])
def test_a_state_that_does_not_go_with_the_database_is_not_trained_on(
    parts: Parts, number: int, age: str | None
) -> None:
    async def steps() -> None:
        await parts.train("forward_backward", b"1")
        await parts.train("optim_step", adam={})
        parts.worker.pid = 2  # another process, which has no model in its memory
        parts.worker.disk["m"]["number"] = number
        told = await parts.train("forward_backward", b"2")
        assert (age is None) is (b"error" not in told.body)
        assert (age or "").encode() in told.body

    run(parts, steps)


def test_what_was_saved_for_a_refused_promise_goes(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_queue, "LONGEST_PAUSE", 1000.0)

    async def steps() -> None:
        parts.promises.tell = _failing_tell(parts, tinker_patience.MOST_FAILURES)  # type: ignore[method-assign]
        assert "has failed" in (await parts.save())["error"]
        await parts.save()

    run(parts, steps)
    weights = parts.home.path / "tinker" / "weights"
    assert [f"tinker/weights/{path.name}" for path in weights.iterdir()] == parts.rows()
