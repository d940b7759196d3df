"""What the queues do where a worker, the disk or the cloud fails: nothing stands still, and nothing counts twice."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from support.daemon.queue_parts import SECONDS, Parts, run

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
from isthmus.daemon.jobs import job_worker
from isthmus.daemon.state.tables import Owner, TinkerModel
from isthmus.daemon.tinker import tinker_patience, training_queue
from isthmus.daemon.tinker.promises import Told
from isthmus.daemon.tinker.refusal import RefusalError
from isthmus.daemon.workers.asking import WorkerError


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
