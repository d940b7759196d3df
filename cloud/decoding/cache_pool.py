"""The keys and values of all sessions of a worker, within one budget of bytes.

A call needs room before it is computed. Where there is none, the caches of others go: of the tenant that has the most
bytes, the one that was used the longest time ago. So a tenant with many caches loses its own first. An edge whose cache
is gone sends the hidden states again, so eviction costs time and nothing else.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from isthmus.backbone.decoding.key_values import KeyValues

Key = tuple[bytes, int]
"""Session, and the number of the cache within it."""


@dataclass(slots=True, eq=False)
class CacheEntry:
    """A cache of keys and values.

    Attributes:
        tenant: Whose it is.
        keys: The keys and values.
        adapters: The lists of sites and the lease that it was computed with.
        nbytes: What it takes, or has room for.
        last_call: The call that it was extended by last; 0 for none.
        used: When it was used last; a number that grows.
        in_use: Whether a call uses it, so that it stays.
    """

    tenant: str
    keys: KeyValues
    adapters: tuple[int, int]
    nbytes: int = 0
    last_call: int = 0
    used: int = 0
    in_use: bool = False


@dataclass(slots=True)
class PoolCounters:
    """What has happened so far.

    Attributes:
        evicted: Caches that went for others.
        lost: Calls that found less in their cache than they begin with.
    """

    evicted: int = 0
    lost: int = 0


@dataclass(slots=True)
class CachePool:
    """The caches of all sessions. Several threads may call it.

    Args:
        budget: Bytes of all of them together.

    Attributes:
        counters: What has happened so far.
    """

    budget: int
    counters: PoolCounters = field(default_factory=PoolCounters)
    _entries: dict[Key, CacheEntry] = field(default_factory=dict)
    _clock: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def used(self) -> int:
        """Bytes of all caches."""
        with self._lock:
            return sum(entry.nbytes for entry in self._entries.values())

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    def find(self, key: Key) -> CacheEntry | None:
        """A session's cache; None where there is none."""
        with self._lock:
            return self._entries.get(key)

    def put(self, key: Key, entry: CacheEntry) -> None:
        """Take in a new cache, which has no bytes yet, in the place of one of the same key."""
        with self._lock:
            self._entries[key] = entry

    def drop(self, key: Key) -> None:
        """Forget a cache."""
        with self._lock:
            self._entries.pop(key, None)

    def release(self, session: bytes) -> None:
        """Forget the caches of a session, which is over."""
        with self._lock:
            for key in [key for key in self._entries if key[0] == session]:
                del self._entries[key]

    def acquire(self, wanted: Sequence[tuple[Key, CacheEntry, int]]) -> list[int]:
        """Make room for calls, and keep their caches until `finish`.

        Nothing waits here: a call that waited on a compute thread would keep those that use the room from ending.

        Args:
            wanted: The key of each call's cache, the cache, and the bytes that it will take: no more than the budget.

        Returns:
            The places of the calls that there is room for. A cache that went for others meanwhile is empty.
        """
        with self._lock:
            return [at for at, each in enumerate(wanted) if self._acquire(*each)]

    def finish(self, key: Key, *, call: int, failed: bool) -> None:
        """A call that was acquired is over. What one that has failed leaves of its cache is forgotten."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                entry.in_use, entry.last_call, entry.nbytes = False, call, entry.keys.nbytes
                if failed:
                    del self._entries[key]

    def _acquire(self, key: Key, entry: CacheEntry, nbytes: int) -> bool:
        nbytes = max(entry.nbytes, nbytes)
        others = [each for each in self._entries.values() if each is not entry]
        if self.budget - sum(each.nbytes for each in others if each.in_use) < nbytes:
            return False  # however many idle caches went
        free = self.budget - sum(each.nbytes for each in others)
        while free < nbytes:
            evicted = self._entries.pop(self._victim(entry))
            free += evicted.nbytes
            evicted.keys.clear()  # also where a call that is about to begin holds it
            evicted.nbytes = 0
            self.counters.evicted += 1
        self._entries[key] = entry
        entry.nbytes, entry.in_use, entry.used = nbytes, True, next(self._clock)
        return True

    def _victim(self, wanting: CacheEntry) -> Key:
        """The cache that goes next."""
        sizes = self._by_tenant()

        def rank(key: Key) -> tuple[int, int]:
            entry = self._entries[key]
            return -sizes[entry.tenant], entry.used

        idle = (key for key, each in self._entries.items() if each is not wanting and not each.in_use and each.nbytes)
        return min(idle, key=rank)

    def _by_tenant(self) -> Counter[str]:
        sizes: Counter[str] = Counter()
        for entry in self._entries.values():
            sizes[entry.tenant] += entry.nbytes
        return sizes
