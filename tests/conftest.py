"""What the tests need of the machine: a marker for each thing that may be missing, and a cache that is not the user's.

A test with one of the markers below is skipped, with the reason, where the thing cannot be had; each is looked for
once in a session:

    index        the package index, through pip and its own configuration
    shared_data  the real task data: $ISTHMUS_SHARED_DATA, or shared/data beside the checkout
    real_model   SmolLM2-135M: the user's cache, the hub, or the package index
    gpu          a CUDA device
    browser      Chromium
    root         to be root
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from rich.console import Console
from support.file_order import begin_with_longest
from support.warm_processes import FOLDER, WarmPopen

from isthmus.backbone.checkpoints.built_in import BUILT_IN
from isthmus.backbone.checkpoints.sources import Checkpoint, default_cache, resolve
from isthmus.common.errors import IsthmusError

ROOT = Path(__file__).parents[1]

settings.register_profile("isthmus", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("isthmus")  # a machine that has other work is no failure

_folder = pytest.StashKey[Path]()
_before = pytest.StashKey[str | None]()
_USERS_CACHE = "ISTHMUS_TESTS_USERS_CACHE"  # tells the processes that tests are spread over
_users_cache = Path(os.environ.get(_USERS_CACHE) or default_cache())


def pytest_configure(config: pytest.Config) -> None:
    """Give the run a cache of its own and torch one thread; every process of the run inherits both.

    By itself torch takes a thread for each core in each process. The run's processes share the cores, and threads that
    wait for one another then keep them from those that compute.

    gRPC's fork handlers are off: a test's process has threads in gRPC, and with the handlers a child that it forks is
    now and then ended by gRPC's own check (SIGABRT) before it comes to its program.
    """
    if _USERS_CACHE in os.environ:
        return
    os.environ[_USERS_CACHE] = str(_users_cache)
    config.stash[_before] = os.environ.get("ISTHMUS_CACHE")
    folder = config.stash[_folder] = Path(tempfile.mkdtemp(prefix="isthmus-tests-"))
    (folder / "cache").mkdir(mode=0o700)
    os.environ |= {"ISTHMUS_CACHE": str(folder / "cache"), FOLDER: str(folder)}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Take it away again; the real model is only linked from there, and stays."""
    if _folder not in config.stash:
        return
    for name in (_USERS_CACHE, FOLDER):
        os.environ.pop(name)
    before = config.stash.get(_before, None)
    if before is None:
        os.environ.pop("ISTHMUS_CACHE", None)
    else:
        os.environ["ISTHMUS_CACHE"] = before
    shutil.rmtree(config.stash[_folder], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest."""
    begin_with_longest(items)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Let no garbage collection look through what is imported: hundreds of thousands of objects, which all stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_sessionfinish() -> None:
    """Let the end of the process look through all again."""
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose marker names something that this machine lacks."""
    for name, missing in _PROBES.items():
        if item.get_closest_marker(name) is not None and (reason := missing()) is not None:
            pytest.skip(f"{name}: {reason}")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the real task data; for tests with the marker `shared_data`."""
    return _shared_data()


@pytest.fixture(scope="session")
def real_model() -> Checkpoint:
    """SmolLM2-135M; for tests with the marker `real_model`."""
    return resolve(BUILT_IN, console=Console(quiet=True))


@pytest.fixture(scope="module")
def warm_module() -> Iterator[None]:
    """Let what a module runs fork its processes, which saves the seconds of imports in each; see `WarmPopen`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", WarmPopen)
        yield


@pytest.fixture
def warm_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what a test runs do so."""
    monkeypatch.setattr(subprocess, "Popen", WarmPopen)


@functools.cache
def _no_index() -> str | None:
    command = [sys.executable, "-m", "pip", "index", "versions", "--retries", "0", "--timeout", "5", "typer"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return "pip gets no answer from the package index"
    if done.returncode == 0:
        return None
    return f"pip cannot reach the package index ({(done.stderr.strip().splitlines() or ['no output'])[-1]})"


def _shared_data() -> Path:
    configured = os.environ.get("ISTHMUS_SHARED_DATA")
    return Path(configured) if configured else ROOT.parent / "shared" / "data"


def _no_shared_data() -> str | None:
    folder = _shared_data()
    return None if folder.is_dir() else f"there is no {folder}; ISTHMUS_SHARED_DATA can name another place"


@functools.cache
def _no_real_model() -> str | None:
    """Have the model in the user's cache, where it is fetched once and not in every run; link it from the run's own."""
    try:
        found = resolve(BUILT_IN, cache_dir=_users_cache, console=Console(quiet=True))
    except IsthmusError as error:
        return str(error)
    link = default_cache() / BUILT_IN
    with contextlib.suppress(FileExistsError):
        link.symlink_to(found.folder.resolve(), target_is_directory=True)
    return None


@functools.cache
def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def _no_browser() -> str | None:
    return None if shutil.which("chromium") else "there is no chromium (Debian's package of that name)"


def _no_root() -> str | None:
    return None if os.geteuid() == 0 else "another user's files are made by root"


_PROBES: dict[str, Callable[[], str | None]] = {
    "index": _no_index,
    "shared_data": _no_shared_data,
    "real_model": _no_real_model,
    "gpu": _no_gpu,
    "browser": _no_browser,
    "root": _no_root,
}
