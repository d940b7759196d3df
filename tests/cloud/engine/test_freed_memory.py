"""Whether a process overwrites what it frees is found out by a try, not believed."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from isthmus.cloud.engine.freed_memory import TUNABLES, check_wiping, is_wiped, wiping
from isthmus.common.errors import ConfigError

TRY = "from isthmus.cloud.engine.freed_memory import is_wiped; print(is_wiped())"
PERTURBED, UNCACHED = "glibc.malloc.perturb=255", "glibc.malloc.tcache_count=0"
glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="this is not glibc")


def is_wiped_with(environment: dict[str, str]) -> bool:
    plain = {name: value for name, value in os.environ.items() if name not in wiping({})}
    done = subprocess.run(
        [sys.executable, "-c", TRY], env={**plain, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip() == "True"


@glibc
@pytest.mark.parametrize(
    ("environment", "wiped"),
    [
        (wiping({}), True),
        (wiping({TUNABLES: "glibc.malloc.arena_max=1"}), True),
        (wiping({TUNABLES: "glibc.malloc.mmap_threshold=4096"}), True),  # blocks that go back to the system at once
        ({}, False),
        ({TUNABLES: PERTURBED}, False),  # what lies in a thread's cache is left as it is
        ({TUNABLES: UNCACHED}, False),
    ],
)
def test_a_process_is_wiped_with_all_the_variables_alone(environment: dict[str, str], wiped: bool) -> None:
    assert is_wiped_with(environment) == wiped


def test_other_tunables_stay() -> None:
    assert wiping({TUNABLES: "glibc.malloc.arena_max=1"})[TUNABLES].split(":") == [
        "glibc.malloc.arena_max=1",
        PERTURBED,
        UNCACHED,
    ]


@pytest.mark.parametrize(("preloaded", "why"), [("libjemalloc.so.2", "LD_PRELOAD loads libjemalloc"), ("", "another")])
def test_a_process_that_is_not_wiped_is_refused_in_one_line(
    preloaded: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_PRELOAD", preloaded)
    with pytest.raises(ConfigError, match=rf"--wipe-freed cannot work here.*{why}") as caught:
        check_wiping()
    assert "\n" not in str(caught.value)


def test_another_library_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())  # musl's or macOS' has no such function
    assert not is_wiped()
