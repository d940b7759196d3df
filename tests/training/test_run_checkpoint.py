"""Checkpoints: whole or absent, checked, and nobody else's."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.common.errors import CheckpointError, DiskError
from isthmus.common.files import new_folder, write_atomic
from isthmus.training import run_checkpoint as checkpoints
from isthmus.training.run_checkpoint import RandomState, RunCheckpoint, check_settings, latest, load, restore_parameters

CPU = torch.device("cpu")
LOG = "losses.jsonl"


def state(step: int = 3, size: int = 4) -> RunCheckpoint:
    torch.manual_seed(step)
    weights = {"a.lora_A": torch.randn(size, 2), "a.lora_B": torch.randn(2, size).t()}
    return RunCheckpoint(
        step=step,
        settings={"rank": 8, "target_modules": ["q_proj"]},
        parameters=weights,
        optimizer={f"{name}/exp_avg": value + 1 for name, value in weights.items()}
        | {"a.lora_A/step": torch.tensor(3.0)},
        log=('{"step": 1}\n', '{"step": 2}\n'),
        random=RandomState.take(CPU),
        tensors={"method": {"ipt/a": torch.ones(2)}},
        entries={"learning_rate": 1e-4, "loss_before": 0.1 + 0.2, "observers": [{"live": ["a", "b"]}, {}]},
    )


def save(out: Path, checkpoint: RunCheckpoint, keep: int) -> Path:
    return checkpoints.save(out, checkpoint, LOG, keep)


SKIP: dict[str, Any] = {"parameters": {}, "optimizer": {}, "tensors": {}, "random": None}
"""What two checkpoints are compared without: tensors have no `==` that is one truth value."""


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    saved = state()
    loaded = load(save(tmp_path, saved, keep=2))
    for ours, theirs in (
        (saved.parameters, loaded.parameters),
        (saved.optimizer, loaded.optimizer),
        (saved.tensors["method"], loaded.tensors["method"]),
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert saved.tensors.keys() == loaded.tensors.keys()
    assert replace(loaded, **SKIP) == replace(saved, **SKIP)


def test_random_states_go_on_where_they_were(tmp_path: Path) -> None:
    random.seed(5)
    saved = state()
    wanted = torch.rand(3), random.random()  # noqa: S311  # the very generator that is saved
    folder = save(tmp_path, saved, keep=1)
    torch.manual_seed(99)
    random.seed(99)
    loaded = load(folder).random
    assert loaded is not None
    loaded.restore(CPU)
    assert torch.equal(wanted[0], torch.rand(3))
    assert wanted[1] == random.random()  # noqa: S311  # the same


def test_the_newest_are_kept_and_the_newest_is_found(tmp_path: Path) -> None:
    assert latest(tmp_path / "none") is None
    for step in (2, 9, 10):
        save(tmp_path, state(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    assert latest(tmp_path) == tmp_path / "checkpoint-10"


def test_half_written_checkpoints_are_ignored_and_swept(tmp_path: Path) -> None:
    save(tmp_path, state(1), keep=2)
    half = tmp_path / ".isthmus-tmp-checkpoint-2"
    half.mkdir()
    (half / "parameters.safetensors").write_bytes(b"x")
    (tmp_path / "checkpoint-x").mkdir()
    assert latest(tmp_path) == tmp_path / "checkpoint-1"
    assert not half.exists()


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


FILES = [f"{name}.safetensors" for name in ("parameters", "optimizer", "method", "random")]


@pytest.mark.parametrize("harm", [damage, cut, Path.unlink])
@pytest.mark.parametrize("name", [*FILES, "losses.jsonl"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, harm: Callable[[Path], None]) -> None:
    folder = save(tmp_path, state(), keep=1)
    harm(folder / name)
    with pytest.raises(CheckpointError, match=rf"checkpoint-3/{name} is damaged"):
        load(folder)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"{", b'{"format": 2, "sha256": {}, "python_random": [3, [1], null]}', b"\xff"]
)
def test_a_damaged_state_is_named(tmp_path: Path, content: bytes) -> None:
    folder = save(tmp_path, state(), keep=1)
    (folder / "state.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        load(folder)


def test_a_state_of_which_a_bit_has_changed_is_refused_or_says_the_same(tmp_path: Path) -> None:
    folder = save(tmp_path, state(), keep=1)
    path = folder / "state.json"
    whole = path.read_bytes()
    saved, refused = replace(load(folder), **SKIP), 0
    for place in range(0, len(whole), 17):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            loaded = replace(load(folder), **SKIP)
            # Where the name of the digest has changed, it is an entry that nobody asks for.
            known = {name: value for name, value in loaded.entries.items() if name in saved.entries}
            assert replace(loaded, entries=known) == saved
        except CheckpointError:
            refused += 1
    assert refused > len(whole) // 34
    assert b'"learning_rate": 0.0001' in whole
    path.write_bytes(whole.replace(b'"learning_rate": 0.0001', b'"learning_rate": 0.0003'))
    with pytest.raises(CheckpointError, match=r"state\.json is damaged \(its SHA-256 differs"):
        load(folder)


def test_a_checkpoint_from_before_states_had_a_digest_is_read(tmp_path: Path) -> None:
    folder = save(tmp_path, state(), keep=1)
    path = folder / "state.json"
    tree = json.loads(path.read_text())
    del tree["own_sha256"]
    path.write_text(json.dumps(tree, indent=1))
    assert load(folder).entries["learning_rate"] == 1e-4


@pytest.mark.parametrize("other", [1, 3])
def test_another_format_is_refused(tmp_path: Path, other: int) -> None:
    folder = save(tmp_path, state(), keep=1)
    tree = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**tree, "format": other}))
    with pytest.raises(CheckpointError, match=f"format {other}, this version reads 2, and 1 of distillations"):
        load(folder)


@pytest.mark.parametrize("name", ["../elsewhere.jsonl", "/etc/x.safetensors", "losses.txt"])
def test_a_file_elsewhere_is_not_read(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, state(), keep=1)
    tree = json.loads((folder / "state.json").read_text())
    del tree["own_sha256"]
    tree["sha256"][name] = "0" * 64
    tree["own_sha256"] = checkpoints._digest_of_state(tree)
    (folder / "state.json").write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match="is no file of a checkpoint"):
        load(folder)


def test_format_1_is_read(tmp_path: Path) -> None:
    folder = save(tmp_path, replace(state(), random=None), keep=1)
    tree = json.loads((folder / "state.json").read_text())
    del tree["own_sha256"]
    (folder / "state.json").write_text(json.dumps({**tree, "format": 1}))
    loaded = load(folder)
    assert (loaded.step, loaded.random) == (3, None)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"a.lora_A": (4, 2)}, r"a\.lora_B has shape \(4, 2\) there and None"),
        ({"a.lora_A": (4, 2), "a.lora_B": (2, 4)}, r"a\.lora_B has shape \(4, 2\) there and \(2, 4\)"),
        ({"a.lora_A": (4, 2), "a.lora_B": (4, 2), "c": (1,)}, r"c has shape None there and \(1,\)"),
    ],
)
def test_parameters_of_another_model_are_refused(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    saved = state().parameters
    restore_parameters(tmp_path, saved, dict(saved))
    with pytest.raises(CheckpointError, match=message):
        restore_parameters(tmp_path, saved, {name: torch.zeros(shape) for name, shape in shapes.items()})


def test_settings_that_differ_are_refused_and_both_values_are_named(tmp_path: Path) -> None:
    saved = {"rank": 8, "only there": 1}
    check_settings(tmp_path, saved, {"rank": 8}, "start anew")
    for wanted, both in (({"rank": 4}, "rank was 8 and is now 4"), ({"new": 4}, "new was None and is now 4")):
        with pytest.raises(CheckpointError, match=f"{both}.*, or start anew"):
            check_settings(tmp_path, saved, wanted, "start anew")


# A full disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_files() -> Iterator[None]:
    """Writes beyond 16 KiB fail, by the operating system's own hand."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_leaves_the_previous_checkpoint(tmp_path: Path, small_files: None) -> None:
    save(tmp_path, state(1), keep=1)
    with pytest.raises(DiskError, match=r"checkpoint-2 cannot be written"):
        save(tmp_path, state(2, size=1 << 14), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert load(tmp_path / "checkpoint-1").step == 1


def test_a_full_disk_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, state(1), keep=1)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"No space left on device.*free some space"):
        save(tmp_path, state(2), keep=1)
    with pytest.raises(DiskError, match="No space left on device"):
        write_atomic(tmp_path / "report.json", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_safetensors_own_complaint_becomes_a_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise checkpoints.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(DiskError, match="No space left on device"):
        save(tmp_path, state(1), keep=1)
    assert list(tmp_path.iterdir()) == []


def interrupted_write(path: Path) -> None:
    with new_folder(path) as folder:
        (folder / "file").write_text("half")
        raise KeyboardInterrupt


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with new_folder(tmp_path / "adapter") as folder:
            (folder / "file").write_text(content)
    assert (tmp_path / "adapter" / "file").read_text() == "new"
    with pytest.raises(KeyboardInterrupt):
        interrupted_write(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
