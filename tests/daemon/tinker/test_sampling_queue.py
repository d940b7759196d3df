"""Samples: each is computed once, and owners take turns, also where what generates fails."""

from __future__ import annotations

import asyncio

import pytest
from support.daemon.queue_parts import SECONDS, Parts, run

from isthmus.daemon.serving.fair_turns import FairTurns
from isthmus.daemon.tinker import tinker_patience
from isthmus.daemon.tinker.sampling_queue import AT_ONCE
from isthmus.daemon.workers.asking import WorkerError


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
    parts.sampling._turns = FairTurns(1)  # several at once would begin in any order

    async def steps() -> None:
        parts.answers.go_on.clear()
        made = [("a", parts.sample("a")) for _ in range(4)]
        async with asyncio.timeout(SECONDS):
            while not parts.answers.owners:
                await asyncio.sleep(0.01)
        made += [("b", parts.sample("b")) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert parts.answers.owners == ["a"]  # the control: the place is taken
        parts.answers.go_on.set()
        for owner, promise in made:
            assert await parts.promises.wait(owner, promise, SECONDS) is not None
        assert parts.answers.owners == ["a", "a", "b", "a", "b", "a"]

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
