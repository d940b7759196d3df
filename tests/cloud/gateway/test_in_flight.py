"""Bytes in flight: a tenant's calls have room beside each other in the order in which they came."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from support.protocol.wire import TENANT

from isthmus.cloud.engine.requests import TooLate
from isthmus.cloud.gateway.calls import InFlight
from isthmus.protocol.enrolment import Quota

OF_100 = replace(TENANT, quota=Quota(max_inflight_bytes=100))


class Crowd:
    """Calls of which each holds its room until it is ended."""

    def __init__(self) -> None:
        self.in_flight = InFlight(lambda _: 1.0)
        self.begun: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}

    async def call(self, name: str, size: int, patience: float | None = None) -> None:
        self._ends[name] = asyncio.Event()
        async with self.in_flight.room_for(OF_100, bytearray(size), patience):
            self.begun.append(name)
            await self._ends[name].wait()

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await settled()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_small_call_does_not_pass_a_large_one_that_waits() -> None:
    async def run() -> None:
        crowd = Crowd()
        calls = [asyncio.create_task(crowd.call(*each)) for each in (("first", 60), ("large", 90), ("small", 10))]
        await settled()
        assert crowd.begun == ["first"]
        await crowd.end("first")
        assert crowd.begun == ["first", "large", "small"]
        for name in ("large", "small"):
            await crowd.end(name)
        await asyncio.gather(*calls)

    asyncio.run(run())


def test_one_that_is_given_up_leaves_its_place_to_the_next() -> None:
    async def run() -> None:
        crowd = Crowd()
        first, large, late, small = (
            asyncio.create_task(crowd.call(*each))
            for each in (("first", 60), ("large", 90), ("late", 90, 0.01), ("small", 10))
        )
        await settled()
        large.cancel()
        with pytest.raises(TooLate):
            await late
        await settled()
        assert crowd.begun == ["first", "small"]
        for name in crowd.begun.copy():
            await crowd.end(name)
        await asyncio.gather(first, small)

    asyncio.run(run())
