"""What waits for slow readers: whose request ends where it is too much, and that others go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import pytest

from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.home import Home
from isthmus.daemon.serving.answers import Answers, Piece, Sampling, Target
from isthmus.daemon.serving.unread_pieces import Unread, UnreadPieces
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.tables import BaseModel
from isthmus.daemon.workers.asking import WorkerError

PIECE = Piece(0, "a" * 100, [1])
MANY = 200


def _fill(pieces: UnreadPieces, count: int) -> bool:
    for _ in range(count):
        pieces.put(PIECE)
    return pieces.wanted


def test_the_largest_request_of_the_owner_who_holds_most_is_ended() -> None:
    async def run() -> None:
        unread = Unread(600 * 1000)
        large, small = unread.request("slow"), unread.request("slow")
        other = unread.request("other")
        assert _fill(other, 200)
        assert _fill(small, 150)
        assert _fill(large, 300)
        assert large.bytes + small.bytes + other.bytes <= unread.most
        large.end()
        assert _fill(other, 100)  # goes beyond, and of the owners "other" does not hold the most
        assert (other.bytes > small.bytes, large.bytes) == (True, 0)
        with pytest.raises(WorkerError, match="read too slowly"):
            await large.next()
        assert not _fill(large, 1)
        assert large.bytes == 0
        assert await small.next() is PIECE
        for each in (large, small, other):
            each.close()
        assert not unread._requests

    asyncio.run(run())


def test_an_error_comes_behind_what_came_before_it() -> None:
    async def run() -> None:
        pieces = Unread().request("a")
        pieces.put(PIECE)
        pieces.end(WorkerError("away", 40))
        pieces.end()
        assert await pieces.next() is PIECE
        with pytest.raises(WorkerError, match="away"):
            await pieces.next()

    asyncio.run(run())


async def _read(pieces: AsyncGenerator[Piece, None]) -> int:
    return sum([1 async for _ in pieces])


class _Worker:
    """Answers of `MANY` pieces, as fast as they are taken, once `together` of them have begun."""

    pid = None
    running = most = 0

    def __init__(self, together: int) -> None:
        self._together, self._begun = together, asyncio.Event()

    async def stream(self, _method: str, **_values: Any) -> AsyncGenerator[tuple[Mapping[str, Any], bytes], None]:
        self.running += 1
        self.most = max(self.most, self.running)
        if self.running == self._together:
            self._begun.set()
        await asyncio.wait_for(self._begun.wait(), 60)
        for _ in range(MANY):
            await asyncio.sleep(0)
            yield PIECE.to_tree(), b""
        self.running -= 1


def _answers(folder: Path, **changes: Any) -> Answers:
    clouds = {"main": {"cloud": "isthmus://c:1#SHA256:x"}}
    settings = DaemonSettings.model_validate({"clouds": clouds, **changes})
    home = Home.make(folder)
    database = Database(home.database)
    with database.session() as session:
        session.add(BaseModel(name="m", cloud="main", facts={"longest": 512}, seen_at=0.0))
    made = Answers(settings, home, database)
    made._worker = _Worker(changes.get("answers_at_once", 1))  # type: ignore[assignment]
    return made


@pytest.mark.parametrize("at_once", [1, 3])
def test_as_many_answers_are_computed_at_the_same_time_as_the_settings_say(tmp_path: Path, at_once: int) -> None:
    async def run() -> int:
        answers = _answers(tmp_path / "home", answers_at_once=at_once)
        asked = [answers.generate(Target("m"), "a", Sampling(n=2)) for _ in range(4)]
        assert await asyncio.gather(*map(_read, asked)) == [2 * MANY] * 4
        most: int = answers._worker.most  # type: ignore[attr-defined]
        return most

    assert asyncio.run(run()) == at_once


def test_slow_readers_keep_no_turn_from_others(tmp_path: Path) -> None:
    async def run() -> None:
        answers = _answers(tmp_path / "home")
        slow = [answers.generate(Target("m"), "a", Sampling(n=4), owner="slow") for _ in range(4)]
        for each in slow:
            await anext(each)  # and no more
        assert await _read(answers.generate(Target("m"), "a", Sampling(), owner="other")) == MANY
        while answers._requests.taken.total():  # those that nobody reads are computed, and then they count no longer
            await asyncio.sleep(0)
        assert answers._turns._free == 2
        assert await _read(slow[0]) == 4 * MANY - 1  # and nothing is lost
        assert answers._unread._requests[0].bytes > 0
        for each in slow:
            await each.aclose()
        assert (answers._requests.taken.total(), answers._unread._requests) == (0, [])

    asyncio.run(run())


def test_what_waits_has_a_bound_and_the_turns_come_back(tmp_path: Path) -> None:
    async def run() -> None:
        answers = _answers(tmp_path / "home")
        answers._unread.most = 50_000  # as much as two answers' pieces are not
        slow = answers.generate(Target("m"), "a", Sampling(n=4), owner="slow")
        await anext(slow)
        assert (
            await _read(answers.generate(Target("m"), "a", Sampling(), owner="other")) == MANY
        )  # who reads at once goes on
        with pytest.raises(WorkerError, match="read too slowly"):
            await _read(slow)
        assert (answers._requests.taken.total(), answers._turns._free) == (0, 2)

    asyncio.run(run())
