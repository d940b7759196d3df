"""Turns: how many at a time, and whose is the next."""

from __future__ import annotations

import asyncio

import pytest

from isthmus.daemon.serving.fair_turns import KEPT_SECONDS, FairTurns, Shares


def test_an_owner_has_a_share_of_the_places_whatever_others_take() -> None:
    places = Shares(8)
    assert [places.take("a") for _ in range(9)] == [True] * 8 + [False]  # the only one has all
    assert [places.take("b") for _ in range(3)] == [True] * 2 + [False]  # half of four, as there are two
    assert [places.take("c") for _ in range(2)] == [True, False]
    places.give_back("a", 4)
    assert [places.take("b") for _ in range(2)] == [True, False]
    assert places.take("a", 2) is places.take("d", 2) is False
    assert places.taken == {"a": 4, "b": 3, "c": 1, "d": 0}
    places.give_back("b", 3)
    assert places.take("a", 2) is True


def test_owners_take_turns() -> None:
    order: list[str] = []

    async def work(turns: FairTurns, owner: str) -> None:
        async with turns.turn(owner):
            order.append(owner)
            await asyncio.sleep(0)

    async def run(owners: str) -> str:
        order.clear()
        turns = FairTurns(1)
        await asyncio.gather(*(work(turns, owner) for owner in owners))
        assert turns._free == 1
        assert not turns._waiting
        return "".join(order)

    assert asyncio.run(run("aaaabbc")) == "aabcaba"
    assert asyncio.run(run("aaaa")) == "aaaa"


@pytest.mark.parametrize(("pause", "second"), [(0.0, False), (KEPT_SECONDS, True)])
def test_the_last_turn_is_kept_for_one_who_has_asked_lately(pause: float, second: bool) -> None:
    async def run() -> None:
        now = 0.0
        asyncio.get_running_loop().time = lambda: now  # type: ignore[method-assign]
        turns, over = FairTurns(2), asyncio.Event()
        began: list[str] = []

        async def work(owner: str) -> None:
            async with turns.turn(owner):
                began.append(owner)
                await over.wait()

        async with turns.turn("b"):
            pass
        now = pause
        tasks = [asyncio.create_task(work(owner)) for owner in "aaab"]
        for _ in range(3):
            await asyncio.sleep(0)
        assert began == (["a", "a"] if second else ["a", "b"])
        over.set()
        await asyncio.gather(*tasks)
        assert sorted(began) == ["a", "a", "a", "b"]
        assert turns._free == 2

    asyncio.run(run())


def test_so_many_have_a_turn_at_a_time() -> None:
    async def run(at_once: int) -> int:
        turns, most, now = FairTurns(at_once), 0, 0

        async def work() -> None:
            nonlocal most, now
            async with turns.turn("a"):
                now += 1
                most = max(most, now)
                await asyncio.sleep(0)
                now -= 1

        await asyncio.gather(*(work() for _ in range(7)))
        return most

    assert [asyncio.run(run(at_once)) for at_once in (1, 3)] == [1, 3]


def test_one_who_stops_waiting_loses_no_turn_for_others() -> None:
    async def run() -> None:
        turns = FairTurns(1)
        got: list[str] = []

        async def work(owner: str) -> None:
            async with turns.turn(owner):
                got.append(owner)

        async with turns.turn("first"):
            tasks = {owner: asyncio.create_task(work(owner)) for owner in ("gone", "late", "stays")}
            await asyncio.sleep(0)
            tasks["gone"].cancel()
            await asyncio.sleep(0)
        tasks["late"].cancel()  # its turn has come, and it does not know yet
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert got == ["stays"]
        assert turns._free == 1

    asyncio.run(run())


def test_one_who_stops_waiting_leaves_nothing_behind() -> None:
    async def run() -> None:
        turns = FairTurns(1)

        async def work(owner: str) -> None:
            async with turns.turn(owner):
                pass

        async with turns.turn("first"):
            tasks = [asyncio.create_task(work(owner)) for owner in "aab"]
            await asyncio.sleep(0)
            assert {owner: len(waits) for owner, waits in turns._waiting.items()} == {"a": 2, "b": 1}
            for task in (tasks[0], tasks[2]):
                task.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert {owner: len(waits) for owner, waits in turns._waiting.items()} == {"a": 1}
        await asyncio.gather(*tasks, return_exceptions=True)
        assert [task.cancelled() for task in tasks] == [True, False, True]
        assert turns._free == 1

    asyncio.run(run())
