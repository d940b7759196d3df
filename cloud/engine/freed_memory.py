"""Whether what a worker frees is overwritten: `serve --wipe-freed`.

glibc can fill memory with a byte when it is freed and when it is given out (`glibc.malloc.perturb`, made for finding
bugs). What is freed into the cache of a thread (tcache) it leaves as it is, so there is none then; and Python's own
allocator keeps small objects to itself, so it is not used either. glibc reads its settings when a process begins: they
are in the environment that the worker is started with.

What is wiped is what is freed. Memory that is still in use after a session, such as a buffer that a library keeps for
its next message, is not; nor is that of a GPU.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

from isthmus.common.errors import ConfigError

FREED_BYTE = 0xFF
"""What freed memory is filled with. What is given out is filled with its complement, zeros."""
TUNABLES = "GLIBC_TUNABLES"
_SIZES = (48, 512, 4096, 1 << 17)
"""Bytes of the blocks that are tried: those of a thread's cache, of the bins, and a large one."""
_LINKS = 32
"""Bytes at the beginning of a free block that the allocator writes its lists into."""
_MARK = b"\xa5"


def wiping(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables with which a process overwrites what it frees; other tunables of `environment` stay."""
    given = [environment[TUNABLES]] if environment.get(TUNABLES) else []
    own = [f"glibc.malloc.perturb={FREED_BYTE}", "glibc.malloc.tcache_count=0"]
    return {TUNABLES: ":".join(given + own), "PYTHONMALLOC": "malloc"}


def is_wiped() -> bool:
    """Whether this process overwrites what it frees, as a try shows. Elsewhere than in glibc nothing is tried."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl and macOS: who reads freed memory there may crash
        return False
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    library.free.restype, library.free.argtypes = None, (ctypes.c_void_p,)
    library.write.restype, library.write.argtypes = ctypes.c_ssize_t, (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    return all(_is_wiped(library, size) for size in _SIZES)


def check_wiping() -> None:
    """Check that this process overwrites what it frees. Raises ConfigError."""
    if is_wiped():
        return
    preloaded = os.environ.get("LD_PRELOAD")
    why = f"LD_PRELOAD loads {preloaded}" if preloaded else "this system has another C library, or another allocator"
    raise ConfigError(
        f"--wipe-freed cannot work here, as the worker's memory is not glibc's to free ({why}): serve with glibc's "
        "allocator, or leave the option out"
    )


def _is_wiped(library: ctypes.CDLL, size: int) -> bool:
    file = os.memfd_create("freed")
    try:
        block = library.malloc(size)
        ctypes.memset(block, _MARK[0], size)
        library.free(block)
        # Nothing is allocated between free and look. A block that has gone back to the system is no longer there: the
        # kernel then writes nothing, where reading it would end the process.
        library.write(file, block, size)
        return _MARK not in os.pread(file, size, _LINKS)
    finally:
        os.close(file)
