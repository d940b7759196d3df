"""Whenever a process is killed while it writes a state, what is read later is the older or the newer one, whole."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.common import files
from isthmus.common.errors import CheckpointError, DiskError
from isthmus.daemon.tinker.training.state_folder import ModelState, StateFolder

SETTINGS = {"rank": 4}


def _state(number: int) -> ModelState:
    a, b, step = (torch.full((64,), float(number)) for _ in range(3))
    return ModelState(number, 10 * number, {"n:mean": number}, {"a": a, "b": b}, {"a/step": step})


def _is(state: ModelState | None, number: int) -> bool:
    if state is None or (state.version, state.number) != (number, 10 * number):
        return False
    tensors = [*state.parameters.values(), *state.optimizer.values()]
    whole = len(tensors) == 3 and all(bool((tensor == number).all()) for tensor in tensors)
    return whole and state.metrics == {"n:mean": number}


def test_a_state_is_read_as_it_was_written_and_the_older_one_is_gone(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "model", SETTINGS)
    assert folder.read() is None
    for number in (1, 2):
        folder.write(_state(number))
        assert _is(folder.read(), number)
        assert not _is(folder.read(), number + 1)
        assert len(list((tmp_path / "model").iterdir())) == 1


def _dying(real: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    """`real`, before whose call number `left` the process is killed."""

    def call(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    return call


def _write_and_die(path: Path, at: int) -> bool:
    """Write state 2 in a process that is killed before its disk operation number `at`; whether it was."""
    child = os.fork()
    if child == 0:
        left = [at]
        for owner, name in ((files, "sync"), (Path, "rename"), (Path, "mkdir"), (shutil, "rmtree"), (Path, "open")):
            setattr(owner, name, _dying(getattr(owner, name), left))
        StateFolder(path, SETTINGS).write(_state(2))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


def test_a_process_that_is_killed_leaves_the_older_or_the_newer_state(tmp_path: Path) -> None:
    found = []
    for at in range(100):
        path = tmp_path / str(at)
        StateFolder(path, SETTINGS).write(_state(1))
        died = _write_and_die(path, at)
        folder = StateFolder(path, SETTINGS)
        state = folder.read()
        assert _is(state, 1) or _is(state, 2), at
        found.append(state.version if state else 0)
        folder.write(_state(3))  # what the dead process has left is in nobody's way
        assert _is(folder.read(), 3)
        if not died:
            break
    assert len(found) > 8
    assert found == sorted(found)
    assert set(found) == {1, 2}


def test_a_state_of_a_change_that_was_undone_gives_way(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, SETTINGS)
    folder.write(_state(1))
    folder.write(ModelState(2, 99, {}, _state(7).parameters, {}))
    folder.write(_state(2))
    assert _is(folder.read(), 2)


def test_another_models_state_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    StateFolder(tmp_path, SETTINGS).write(_state(1))
    with pytest.raises(CheckpointError, match="rank was 4 and is now 8"):
        StateFolder(tmp_path, {"rank": 8}).read()
    file = tmp_path / "checkpoint-1" / "parameters.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"parameters\.safetensors is damaged"):
        StateFolder(tmp_path, SETTINGS).read()


def test_a_disk_that_takes_nothing_leaves_the_older_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = StateFolder(tmp_path, SETTINGS)
    folder.write(_state(1))
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", _full)
        with pytest.raises(DiskError, match="No space"):
            folder.write(_state(2))
    assert _is(folder.read(), 1)


def _full(_path: Path) -> None:
    raise OSError(28, "No space left on device")
