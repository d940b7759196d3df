"""Checkpoints of a run: everything that the next step depends on, as safetensors and JSON.

    checkpoint-<step>/
        parameters.safetensors   what is trained, by name
        optimizer.safetensors    the optimizer's moments and step counts, `<parameter>/<moment>`; empty without any
        random.safetensors       torch's random state, bytes
        <name>.safetensors       further tensors of the run's own
        <log>.jsonl              the log up to this step
        state.json               `format`, `step`, `settings` (what may not change half-way), Python's random state, the
                                 SHA-256 of each file above, that of `state.json` itself without this entry, and beside
                                 them the run's own entries

Format 1 of distillations, which has neither a random state nor a digest of `state.json`, is read, and so is format 2
without the latter. Format 1 of other runs, which has a random state in another layout, is not.

A checkpoint is written beside its place and renamed into it after everything is on the disk, so a folder of that name
is whole.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from isthmus.common.errors import CheckpointError
from isthmus.common.files import new_folder, remove_folder, sha256_of, sweep

FORMAT = 2

_NAME = re.compile(r"checkpoint-(\d+)")
_FILE = re.compile(r"([a-z_]+)\.(safetensors|jsonl)")
_OWN_DIGEST = "own_sha256"
_COMMON = {"format", "step", "settings", "python_random", "sha256", _OWN_DIGEST}


@dataclass(frozen=True, slots=True)
class RandomState:
    """Python's and torch's global random states, on which a step depends.

    `host` is the state of torch's CPU generator, uint8; `device` that of the CUDA generator, if there is one.
    """

    python: tuple[Any, ...]
    host: Tensor
    device: Tensor | None = None

    @classmethod
    def take(cls, device: torch.device) -> RandomState:
        """The states of now."""
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(random.getstate(), torch.get_rng_state(), on_device)

    def restore(self, device: torch.device) -> None:
        """Make them the states of now."""
        random.setstate(self.python)
        torch.set_rng_state(self.host)
        if self.device is not None and device.type == "cuda":
            torch.cuda.set_rng_state(self.device, device)


@dataclass(frozen=True, slots=True)
class RunCheckpoint:
    """The state between two optimizer steps.

    Attributes:
        settings: What may not change half-way, by its name in messages.
        log: The lines of the log, with their line breaks.
        random: The random states before the next step; None where format 1 has none.
        tensors: Further tensors, by the file that they are in.
        entries: The run's own entries of `state.json`, plain values.
    """

    step: int
    settings: Mapping[str, Any]
    parameters: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    log: tuple[str, ...]
    random: RandomState | None
    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    entries: Mapping[str, Any] = field(default_factory=dict)


def save(out: Path, checkpoint: RunCheckpoint, log_name: str, keep: int) -> Path:
    """Write `checkpoint` as `out/checkpoint-<step>` and remove all but the newest `keep`.

    A checkpoint of the same step is left as it is: it holds the same state.

    Raises:
        DiskError: The disk is full or cannot be written. Older checkpoints are untouched, and no part of the new one is
            left.
    """
    folder = out / f"checkpoint-{checkpoint.step}"
    if not folder.exists():
        with new_folder(folder) as temporary:
            _write(temporary, checkpoint, log_name)
    for old in _folders(out)[:-keep]:
        remove_folder(old)
    return folder


def _write(folder: Path, checkpoint: RunCheckpoint, log_name: str) -> None:
    files = {"parameters": checkpoint.parameters, "optimizer": checkpoint.optimizer, **checkpoint.tensors}
    own: dict[str, Any] = {}
    if checkpoint.random is not None:
        device = checkpoint.random.device
        files["random"] = {"torch": checkpoint.random.host} | ({} if device is None else {"device": device})
        own = {"python_random": checkpoint.random.python}
    for name, tensors in files.items():
        values = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        save_file(values, folder / f"{name}.safetensors")
    (folder / log_name).write_text("".join(checkpoint.log), encoding="utf-8")
    state = {
        "format": FORMAT,
        "step": checkpoint.step,
        "settings": dict(checkpoint.settings),
        **checkpoint.entries,
        **own,
        "sha256": {path.name: sha256_of(path).hex() for path in sorted(folder.iterdir())},
    }
    state[_OWN_DIGEST] = _digest_of_state(state)
    (folder / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")


def latest(out: Path) -> Path | None:
    """The newest whole checkpoint in `out`, or `None`. What an interrupted write left behind is removed, never read."""
    if not out.is_dir():
        return None
    sweep(out)
    folders = _folders(out)
    return folders[-1] if folders else None


def _folders(out: Path) -> list[Path]:
    found = [(int(match[1]), path) for path in out.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found)]


def load(folder: Path) -> RunCheckpoint:
    """Read a checkpoint back, every file checked against its digest.

    Raises:
        CheckpointError: A file is missing or damaged, or the format is another; the message says which.
    """
    state = _state(folder)
    with_reason: Callable[[str], CheckpointError] = lambda why: _damaged(folder / "state.json", why)  # noqa: E731
    try:
        of_distillation = state["format"] == 1 and "python_random" not in state
        if state["format"] != FORMAT and not of_distillation:
            raise CheckpointError(
                f"{folder} has format {state['format']}, this version reads {FORMAT}, and 1 of distillations: "
                "resume with the version that wrote it."
            )
        recorded = state.pop(_OWN_DIGEST, None)
        if recorded is not None and recorded != _digest_of_state(state):
            raise with_reason("its SHA-256 differs from the one in it")
        digests = state["sha256"]
        for name, digest in digests.items():
            if _FILE.fullmatch(name) is None:
                raise with_reason(f"{name!r} is no file of a checkpoint")
            if sha256_of(folder / name).hex() != digest:
                raise _damaged(folder / name, "its SHA-256 differs from the recorded one")
        tensors = {Path(name).stem: load_file(folder / name) for name in digests if name.endswith(".safetensors")}
        (log,) = (name for name in digests if name.endswith(".jsonl"))
        return RunCheckpoint(
            step=int(state["step"]),
            settings=dict(state["settings"]),
            parameters=tensors.pop("parameters"),
            optimizer=tensors.pop("optimizer"),
            log=tuple((folder / log).read_text(encoding="utf-8").splitlines(keepends=True)),
            random=None if of_distillation else _random(state["python_random"], tensors.pop("random")),
            tensors=tensors,
            entries={name: value for name, value in state.items() if name not in _COMMON},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise with_reason(f"an entry is missing or of the wrong kind: {error}") from error
    except SafetensorError as error:
        raise _damaged(folder, str(error)) from error
    except CheckpointError:
        raise
    except OSError as error:
        raise _damaged(Path(error.filename or folder), error.strerror or str(error)) from error
    except ValueError as error:
        raise with_reason(f"an entry makes no sense: {error}") from error


def _random(python: Any, tensors: Mapping[str, Tensor]) -> RandomState:
    version, numbers, gauss = python
    return RandomState((version, tuple(numbers), gauss), tensors["torch"], tensors.get("device"))


def _state(folder: Path) -> dict[str, Any]:
    path = folder / "state.json"
    try:
        state = json.loads(path.read_bytes())
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    except ValueError as error:
        raise _damaged(path, f"not JSON: {error}") from error
    if not isinstance(state, dict):
        raise _damaged(path, "not a JSON object")
    return state


def check_settings(folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any], start_anew: str) -> None:
    """Refuse to go on with a checkpoint of another run.

    Args:
        wanted: Those of this run. Others that were saved do not matter.
        start_anew: What the user does to begin a new run instead.

    Raises:
        CheckpointError: They differ; the message names both.
    """
    for name, value in wanted.items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"{folder} cannot be resumed: {name} was {saved.get(name)!r} and is now {value!r}. "
                f"Resume with what it was started with, or {start_anew}."
            )


def restore_parameters(folder: Path, saved: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Give the parameters the values of a checkpoint; refuse one whose parameters are not those of this run.

    Raises:
        CheckpointError: A name or a shape differs.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    there = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if wanted != there:
        name = next(name for name in [*wanted, *there] if wanted.get(name) != there.get(name))
        raise CheckpointError(
            f"{folder} cannot be resumed: {name} has shape {there.get(name)} there and {wanted.get(name)} "
            "in this model. Resume with the model and method that it was started with."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


def damaged_entry(folder: Path, error: Exception) -> CheckpointError:
    """The error for an entry of the run's own that is missing or of the wrong kind."""
    return _damaged(folder / "state.json", f"an entry is missing or of the wrong kind: {error}")


def _digest_of_state(state: Mapping[str, Any]) -> str:
    """SHA-256 of the entries as JSON without layout, with what becomes of Python's tuples and keys in a file."""
    entries = json.loads(json.dumps(state))
    return hashlib.sha256(json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged ({why}): remove its checkpoint folder to resume from the one before, if there is one."
    )
