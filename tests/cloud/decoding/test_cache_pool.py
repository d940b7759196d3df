"""The pool of keys and values: one budget, fair eviction, and waiting that holds nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from isthmus.cloud.decoding.cache_pool import CacheEntry, CachePool, Key


class Keys:
    """Stands for keys and values of a size."""

    def __init__(self, nbytes: int = 0) -> None:
        self.nbytes = nbytes

    def clear(self) -> None:
        self.nbytes = 0


def entry(tenant: str) -> CacheEntry:
    keys: Any = Keys()
    return CacheEntry(tenant, keys, (0, 0))


def key(session: int, number: int = 0) -> Key:
    return bytes([session]), number


def used(pool: CachePool, name: Key, tenant: str, nbytes: int, call: int = 1) -> None:
    """A call over a cache, from its beginning to its end."""
    if pool.find(name) is None:
        pool.put(name, entry(tenant))
    found: Any = pool.find(name)
    assert pool.acquire([(name, found, nbytes)]) == [0]
    found.keys.nbytes = nbytes
    pool.finish(name, call=call, failed=False)


def test_the_tenant_with_most_loses_its_oldest() -> None:
    pool = CachePool(100)
    used(pool, key(1), "alice", 20)
    used(pool, key(2), "bob", 30)
    used(pool, key(3), "bob", 25)
    used(pool, key(1), "alice", 25)
    used(pool, key(4), "carol", 30)
    assert pool.find(key(2)) is None  # bob's older one, though alice's was made first
    assert [pool.find(key(each)) is not None for each in (1, 3, 4)] == [True] * 3
    assert (pool.used, pool.counters.evicted) == (80, 1)


def test_a_tenant_with_many_caches_evicts_its_own() -> None:
    pool = CachePool(100)
    used(pool, key(1), "alice", 10)
    for number in range(50):
        used(pool, key(2, number), "flood", 10)
    assert pool.find(key(1)) is not None
    assert pool.used <= 100


def test_what_is_in_use_stays_and_nothing_waits_for_it() -> None:
    pool = CachePool(100)
    one, two = entry("alice"), entry("alice")
    assert pool.acquire([(key(1), one, 60)]) == [0]
    assert pool.acquire([(key(2), two, 60)]) == []
    assert pool.acquire([(key(1), one, 60)]) == [0]  # a further step of the one that has begun
    keys: Any = one.keys
    keys.nbytes = 60
    pool.finish(key(1), call=1, failed=False)
    assert pool.acquire([(key(2), two, 60)]) == [0]
    assert pool.find(key(1)) is None
    assert keys.nbytes == 0  # whoever holds it still holds no memory


def test_a_call_that_eviction_makes_no_room_for_evicts_nothing() -> None:
    pool = CachePool(100)
    used(pool, key(1), "alice", 20)
    assert pool.acquire([(key(2), entry("bob"), 50)]) == [0]
    for _ in range(3):  # it asks again
        assert pool.acquire([(key(3), entry("carol"), 60)]) == []
    assert pool.find(key(1)) is not None
    assert (pool.used, pool.counters.evicted) == (70, 0)
    assert pool.acquire([(key(3), entry("carol"), 50)]) == [0]  # which fits once the idle one is evicted
    assert (pool.find(key(1)), pool.counters.evicted) == (None, 1)


def test_of_a_batch_those_that_fit_go_first() -> None:
    pool = CachePool(100)
    wanted = [(key(session), entry("alice"), 40) for session in range(3)]
    assert pool.acquire(wanted) == [0, 1]
    assert pool.used == 80


def test_a_failed_call_leaves_nothing_and_a_session_that_ends_neither() -> None:
    pool = CachePool(100)
    pool.acquire([(key(1), entry("alice"), 10)])
    pool.finish(key(1), call=1, failed=True)
    assert pool.find(key(1)) is None
    for number in range(3):
        used(pool, key(1, number), "alice", 10)
    used(pool, key(2), "alice", 10)
    pool.release(bytes([1]))
    assert (len(pool), pool.used) == (1, 10)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(1, 100)), max_size=60), st.integers(100, 300)
)
def test_the_budget_is_never_exceeded(calls: list[tuple[int, int, int]], budget: int) -> None:
    pool = CachePool(budget)
    for number, (session, cache, nbytes) in enumerate(calls, start=1):
        used(pool, key(session, cache), f"tenant {session % 3}", nbytes, number)
        assert pool.used <= budget


def test_without_eviction_it_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CachePool, "_acquire", lambda *_: True)
    pool = CachePool(100)
    for session in range(4):
        used(pool, key(session), "alice", 40)
    assert pool.used > 100
