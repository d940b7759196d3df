"""Which half-open call is ended for a new one."""

from __future__ import annotations

import asyncio

import pytest

from isthmus.cloud.bounds import Bounds
from isthmus.cloud.gateway.half_open import HalfOpen, host_of, to_end

PLACES = 64


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [
        ([("a", False)], 0),
        ([("a", True), ("b", False)], 1),
        ([("a", True), ("a", True), ("b", False), ("b", False)], 2),
        ([("a", False), ("b", False), ("b", False), ("c", True)], 1),
        ([("a", False), ("b", True), ("b", True), ("b", False)], 3),  # of the silent, the one whose peer has most
        ([("a", False), ("b", True), ("c", True), ("c", True)], 2),  # few are silent: the peer with the most gives way
        ([("a", True), ("b", True), ("c", False)], 0),  # of equals the oldest
    ],
    ids=["alone", "silent", "oldest-silent", "peer", "peer-of-all", "hellos", "equals"],
)
def test_which_call_is_ended(waiting: list[tuple[str, bool]], expected: int) -> None:
    assert to_end(waiting) == expected


def flooded(waiting: list[tuple[str, bool]], flood: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Who is left of `waiting`, after so many others have come."""
    for peer, greeted in flood:
        if len(waiting) >= PLACES:
            del waiting[to_end(waiting)]
        waiting = [*waiting, (peer, greeted)]
    return waiting


@pytest.mark.parametrize("greeted", [False, True])
def test_a_flood_from_one_address_displaces_itself_alone(greeted: bool) -> None:
    honest = [(f"edge{number}", number % 2 == 0) for number in range(20)]
    left = flooded(honest, [("stranger", greeted)] * 1000)
    assert left[:20] == honest
    assert len(left) == PLACES


def test_a_flood_of_nothing_from_many_addresses_leaves_those_who_have_said_hello() -> None:
    honest = [(f"edge{number}", True) for number in range(PLACES // 2)]
    left = flooded(honest, [(f"stranger{number}", False) for number in range(1000)])
    assert left[: PLACES // 2] == honest


def test_hellos_leave_newcomers_half_of_the_places() -> None:
    waiting = flooded([], [(f"stranger{number}", True) for number in range(1000)])
    waiting = flooded(waiting, [(f"edge{number}", False) for number in range(1000)])
    assert sum(not greeted for _, greeted in waiting) == PLACES // 2


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.0.0.1:5000", "ipv4:10.0.0.1"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:5000", "ipv6:20010db800010002"),
        ("ipv6:[2001:db8:1:2::9]:6000", "ipv6:20010db800010002"),
        ("ipv6:%5Bfe80::1%25eth0%5D:5000", "ipv6:fe80000000000000"),
        ("unix:/run/isthmus", "unix"),
    ],
)
def test_a_host_is_an_address_without_its_port(peer: str, host: str) -> None:
    assert host_of(peer) == host


def test_one_host_has_its_own_bound_and_its_oldest_gives_way() -> None:
    ended: list[str] = []

    async def come(places: HalfOpen, host: str, name: str) -> None:
        try:
            async with places.place(host):
                await asyncio.sleep(3600)
        except TimeoutError:
            ended.append(name)

    async def run() -> None:
        places = HalfOpen(Bounds(max_half_open=4, max_half_open_per_host=2, handshake_seconds=3600))
        coming = [("a", "a1"), ("b", "b1"), ("a", "a2"), ("a", "a3"), ("c", "c1"), ("a", "a4"), ("d", "d1")]
        tasks = []
        for host, name in coming:
            tasks.append(asyncio.ensure_future(come(places, host, name)))
            for _ in range(5):  # turns of the loop, for whoever gives way to have gone
                await asyncio.sleep(0)
        assert len(places) == 4
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert len(places) == 0

    asyncio.run(run())
    assert ended == ["a1", "a2", "a3"]  # the third one for d, as a had most
