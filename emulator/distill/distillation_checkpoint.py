"""The state of a distillation between two steps, as safetensors and JSON.

    checkpoint-<step>/
        parameters.safetensors   the emulator's weights, by name
        optimizer.safetensors    AdamW's moments and step counts, `<weight>/<moment>`
        distill.jsonl            the log up to this step
        state.json               the step, what may not change half-way, and the SHA-256 of each file above

It is written beside its place and renamed after everything is on the disk; the newest one is kept.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from isthmus.backbone.checkpoints.tensor_reader import read_json, write_json
from isthmus.common.errors import CheckpointError
from isthmus.common.files import new_folder, remove_folder, sweep

LOG_FILE = "distill.jsonl"

_FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_FILES = ("parameters.safetensors", "optimizer.safetensors", LOG_FILE)


@dataclass(frozen=True, slots=True)
class State:
    """What the next step depends on.

    Attributes:
        step: Applied steps.
        settings: What may not change half-way: whose emulator, which text, which options.
        error_before: Relative error on held-out blocks before the first step.
        parameters: The emulator's weights.
        optimizer: AdamW's state.
        log: The lines of the log.
    """

    step: int
    settings: Mapping[str, Any]
    error_before: float
    parameters: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    log: tuple[str, ...]


def save(folder: Path, state: State) -> Path:
    """Write `state` as `folder/checkpoint-<step>`, then remove the older ones.

    Raises:
        DiskError: The disk is full or cannot be written. Older checkpoints are untouched, and no part of the new one is
            left.
    """
    new = folder / f"checkpoint-{state.step}"
    if not new.exists():
        with new_folder(new) as temporary:
            for name, tensors in (("parameters", state.parameters), ("optimizer", state.optimizer)):
                values = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
                save_file(values, temporary / f"{name}.safetensors")
            (temporary / LOG_FILE).write_text("".join(state.log), encoding="utf-8")
            info = {
                "format": _FORMAT,
                "step": state.step,
                "settings": dict(state.settings),
                "error_before": state.error_before,
                "sha256": {name: _digest(temporary / name) for name in _FILES},
            }
            write_json(temporary / "state.json", info)
    for old in _folders(folder)[:-1]:
        remove_folder(old)
    return new


def load_newest(folder: Path, settings: Mapping[str, Any]) -> State | None:
    """The newest state in `folder`, every file checked against its digest; None where there is none.

    What an interrupted write left behind is removed.

    Raises:
        CheckpointError: A file is missing or damaged, or the state belongs to something else than `settings` say; the
            message names what.
    """
    sweep(folder)
    found = _folders(folder)
    if not found:
        return None
    newest = found[-1]
    info = read_json(newest / "state.json")
    if info.get("format") != _FORMAT:
        raise CheckpointError(f"{newest} is of format {info.get('format')}; go on with the version that wrote it")
    try:
        _check_settings(newest, info["settings"], settings)
        for name in _FILES:
            if _digest(newest / name) != info["sha256"][name]:
                raise _damaged(newest, f"{name} is not what was written")
        return State(
            step=int(info["step"]),
            settings=info["settings"],
            error_before=float(info["error_before"]),
            parameters=load_file(newest / "parameters.safetensors"),
            optimizer=load_file(newest / "optimizer.safetensors"),
            log=tuple((newest / LOG_FILE).read_text(encoding="utf-8").splitlines(keepends=True)),
        )
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise _damaged(newest, f"an entry is missing or of the wrong kind: {error}") from error
    except OSError as error:
        raise _damaged(newest, str(error.strerror or error)) from error


def _check_settings(folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{folder} cannot be gone on with: {name} was {saved.get(name)!r} and is now {wanted.get(name)!r}. "
                "Use what it was started with, or remove its folder to start anew."
            )


def _folders(folder: Path) -> list[Path]:
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{folder} is damaged ({why}); remove it to start the distillation anew")
