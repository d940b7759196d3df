"""Looks for canaries: in the memory of processes, in files, and in what a server says.

Of a process, all pages that it holds are read, also those that are swapped out. Memory that several processes share,
such as Ray's object store, is read through a process that has it open. Reading makes no page that was not there before.
Needs Linux, and to be the user of the process or root.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isthmus.common.errors import IsthmusError

WINDOW = 24
"""Bytes of a canary in memory."""
PREFIX = 8
"""First bytes of a canary, which most places are dismissed by: as many as numpy compares at once, in one uint64."""
_OF_PREFIX = np.arange(PREFIX)
_PAGE = mmap.PAGESIZE
_CHUNK = 1 << 26
BLOCK = 1 << 22
"""Bytes that are looked through at a time: few enough that their places, of eight bytes each, fit into 32 MiB."""
_PRESENT = np.uint64(0b11 << 62)  # bits of /proc/PID/pagemap: in memory, or swapped out
_NO_MEMORY = ("[vvar]", "[vsyscall]", "[vvar_vclock]")


class Scanner:
    """Counts canaries.

    Args:
        canaries: What each is of, by its bytes: at least `PREFIX` of them.

    Attributes:
        scanned: Bytes that were looked through.
    """

    def __init__(self, canaries: Mapping[bytes, str]) -> None:
        self.scanned = 0
        self._longest = max(map(len, canaries), default=PREFIX)
        self._canaries: dict[int, list[tuple[bytes, str]]] = {}  # by their first bytes, as a number
        self._first, self._second = np.zeros((2, 1 << 16), bool)  # which pairs of bytes canaries begin with
        for canary, kind in canaries.items():
            self._first[int.from_bytes(canary[:2], "little")] = True
            self._second[int.from_bytes(canary[2:4], "little")] = True
            self._canaries.setdefault(int.from_bytes(canary[:PREFIX], "little"), []).append((canary, kind))
        self._prefixes = np.array(sorted(self._canaries), np.uint64)

    def count(self, parts: Iterable[bytes]) -> Counter[str]:
        """How often canaries of each kind are in pieces of bytes, none of which goes on in another."""
        found: Counter[str] = Counter()
        for part in parts:
            self.scanned += len(part)
            for start in range(0, len(part), BLOCK):
                found.update(self._beginning_in(memoryview(part)[start : start + BLOCK + self._longest - 1]))
        return found

    def _beginning_in(self, block: memoryview) -> Iterator[str]:
        """The kinds of canaries that begin in the first `BLOCK` bytes; behind these is what they may go on in."""
        if len(block) < PREFIX or not self._canaries:
            return
        raw = np.frombuffer(block, np.uint8)
        for shift in (0, 1):
            pairs = np.frombuffer(block, np.dtype("<u2"), (len(block) - shift) // 2, shift)
            begins = self._first[pairs[:-1]] & self._second[pairs[1:]]
            places: NDArray[np.intp] = np.flatnonzero(begins) * 2 + shift
            places = places[(places < BLOCK) & (places <= len(block) - PREFIX)]
            prefixes = np.ascontiguousarray(raw[places[:, None] + _OF_PREFIX]).view(np.dtype("<u8")).ravel()
            # Of each, the first known one that is not smaller, or else the last: it is the same, or none is.
            known = self._prefixes[np.searchsorted(self._prefixes[:-1], prefixes)] == prefixes
            for place, prefix in zip(places[known], prefixes[known], strict=True):
                for canary, kind in self._canaries[int(prefix)]:
                    if block[place : place + len(canary)] == canary:
                        yield kind


def canaries_of(data: bytes, count: int) -> Iterator[bytes]:
    """Up to so many windows of bytes, from all over them, that are not found by chance: of many different bytes."""
    for at in range(count):
        start = (2 * at + 1) * len(data) // (2 * count)
        for shift in range(4):  # a value whose low bytes are zero begins with bytes that are everywhere
            window = data[start + shift : start + shift + WINDOW]
            if len(window) == WINDOW and len(set(window)) >= WINDOW // 3 and all(window[:2]):
                yield window
                break


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """With a process that stands still. Raises IsthmusError where it has ended."""
    try:
        os.kill(pid, signal.SIGSTOP)
        while not _stands(pid):  # the signal is only on its way when `kill` returns
            time.sleep(0.001)
    except OSError as error:
        raise IsthmusError(f"process {pid} cannot be stopped ({error})") from None
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _stands(pid: int) -> bool:
    """Whether all its threads are stopped, or have ended."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread ends meanwhile
            if (thread / "stat").read_text().rpartition(") ")[2][0] not in "TtZX":
                return False
    return True


def memory_of(pid: int) -> list[bytes]:
    """A copy of all the private and mapped memory that a process holds, in runs of pages that lie together.

    Raises IsthmusError where the process has ended, or may not be read.
    """
    try:
        return list(_runs(pid))
    except OSError as error:
        raise IsthmusError(f"the memory of process {pid} cannot be read ({error}): be its user, or root") from None


def _runs(pid: int) -> Iterator[bytes]:
    folder = Path(f"/proc/{pid}")
    with (folder / "mem").open("rb", buffering=0) as memory, (folder / "pagemap").open("rb", buffering=0) as pages:
        for line in (folder / "maps").read_text().splitlines():
            area, rights, *rest = line.split(maxsplit=5)
            if not rights.startswith("r") or rest[-1] in _NO_MEMORY:
                continue
            start, end = (int(each, 16) for each in area.split("-"))
            for first, last in _held(pages, start // _PAGE, end // _PAGE):
                memory.seek(first * _PAGE)
                with contextlib.suppress(OSError):  # a device's pages
                    yield _read(memory, (last - first) * _PAGE)


def _held(pages: object, first: int, last: int) -> list[tuple[int, int]]:
    """Runs of pages between two that the process holds, each to before its end."""
    pages.seek(first * 8)  # type: ignore[attr-defined]
    entries = np.frombuffer(_read(pages, (last - first) * 8), np.uint64)
    held = np.concatenate(([0], ((entries & _PRESENT) != 0).astype(np.int8), [0]))
    edges = np.flatnonzero(np.diff(held))
    return [(first + int(a), first + int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _read(file: object, size: int) -> bytes:
    """So many bytes, or fewer where there are no more."""
    parts = []
    while size and (part := file.read(min(size, _CHUNK))):  # type: ignore[attr-defined]
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def shared_files_of(pid: int) -> Iterator[bytes]:
    """What is in the shared memory that a process has open: the parts of it that were ever written."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # it has been closed meanwhile
            if str(link.readlink()).startswith(("/dev/shm/", "/memfd:", "/tmp/plasma")):  # noqa: S108  # names of Ray's
                yield from _written_parts(link)


def _written_parts(path: Path) -> Iterator[bytes]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        end = 0
        while True:
            try:
                start = os.lseek(descriptor, end, os.SEEK_DATA)
            except OSError:  # no more data
                return
            end = os.lseek(descriptor, start, os.SEEK_HOLE)
            os.lseek(descriptor, start, os.SEEK_SET)
            with os.fdopen(os.dup(descriptor), "rb", buffering=0) as file:
                yield _read(file, end - start)
    finally:
        os.close(descriptor)


def files_below(*places: Path, wanted: Callable[[Path], bool] = lambda path: True) -> Iterator[bytes]:
    """The files below folders, those that are wanted and can be read; links are not followed."""
    for path in (path for place in places for path in place.rglob("*")):
        with contextlib.suppress(OSError):  # it is gone
            if wanted(path) and path.is_file() and not path.is_symlink():
                yield path.read_bytes()
