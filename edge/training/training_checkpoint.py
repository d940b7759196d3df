"""Checkpoints of a training run: everything that the next step depends on, as safetensors and JSON.

    checkpoint-<step>/
        parameters.safetensors   what is trained, by name
        optimizer.safetensors    the optimizer's moments and step counts, `<parameter>/<moment>`; empty without any
        method.safetensors       what the PEFT method remembers besides parameters (AdaLoRA), often empty
        random.safetensors       torch's random state, bytes
        losses.jsonl             the loss log up to this step
        state.json               counters, Python's random state, whose run it is, what is remembered from step to step
                                 besides tensors, the SHA-256 of each file above, and that of itself without this entry;
                                 older checkpoints have no such entry and are read without

A checkpoint is written beside its place and renamed into it after everything is on the disk, so a folder of that name
is whole. A resumed run goes on exactly where the checkpoint was taken: on one machine and with as many threads, its
adapter equals an undisturbed run's bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from isthmus.common.errors import CheckpointError
from isthmus.common.files import new_folder, remove_folder, sweep
from isthmus.edge.config.training_config import TuningConfig
from isthmus.edge.run_report import Spent

_FORMAT = 2
_NAME = re.compile(r"checkpoint-(\d+)")
_OWN_DIGEST = "own_sha256"
_TENSOR_FILES = ("parameters", "optimizer", "method", "random")

# Options that do not change what a step computes; every other one must be the same after a resume. The data's path and
# form are covered by the fingerprint of the tokens, the package by the model's identity; steps and epochs by the total,
# where it matters; the adapter to go on from by its contents.
_FREE = {
    "cloud",
    "key",
    "package",
    "signer",
    "data",
    "validation",
    "validation_split",
    "format",
    "header",
    "text_column",
    "prompt_column",
    "completion_column",
    "prompt_template",
    "completion_template",
    "max_length",
    "steps",
    "epochs",
    "out",
    "save_every",
    "keep_checkpoints",
    "resume",
    "report_to",
    "log_every",
    "eval_every",
    "threads",
    "connect_timeout",
    "give_up_after",
    "call_timeout",
    "tls_ca",
    "tls_cert",
    "tls_key",
    "start_from",
    "plugged",
}


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model a run tunes.

    `digest` is of its weights and configuration; `plan` is the split plan ("2:2"), or "whole" without one. What the
    cloud's span computes in, and with which attention, is None where there is no cloud. `package` is the id of the
    package whose emulator stands for the middle layers, None where these are the model's own.
    """

    name: str
    digest: str
    plan: str
    span_dtype: str | None = None
    attn_implementation: str | None = None
    package: str | None = None


@dataclass(frozen=True, slots=True)
class RandomState:
    """Python's and torch's global random states.

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
class Checkpoint:
    """The state between two optimizer steps.

    `step` counts applied steps; `epoch` and `position` (in micro-batches) say what comes next. `settings` are those
    options that a run may not change half-way. `method_state` and `method_tensors` are the PEFT method's own,
    `observers` the states of what is called around every step.
    """

    step: int
    epoch: int
    position: int
    model: ModelIdentity
    data: str
    settings: Mapping[str, Any]
    parameters: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    random: RandomState
    losses: tuple[str, ...]
    learning_rate: float
    loss_before: float | None
    spent: Spent
    method_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    method_state: Mapping[str, Any] = field(default_factory=dict)
    observers: tuple[Mapping[str, Any], ...] = ()


def save(out: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `checkpoint` as `out/checkpoint-<step>` and remove all but the newest `keep`.

    A checkpoint of the same step is left as it is: it holds the same state.

    Raises:
        DiskError: The disk is full or cannot be written. Older checkpoints are untouched, and no part of the new one is
            left.
    """
    folder = out / f"checkpoint-{checkpoint.step}"
    if not folder.exists():
        with new_folder(folder) as temporary:
            _write(temporary, checkpoint)
    for old in _folders(out)[:-keep]:
        remove_folder(old)
    return folder


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    device = checkpoint.random.device
    tensors: dict[str, Mapping[str, Tensor]] = {
        "parameters": checkpoint.parameters,
        "optimizer": checkpoint.optimizer,
        "method": checkpoint.method_tensors,
        "random": {"torch": checkpoint.random.host} | ({} if device is None else {"device": device}),
    }
    digests = {}
    for name, values in tensors.items():
        path = folder / f"{name}.safetensors"
        save_file({key: value.detach().contiguous() for key, value in values.items()}, path)
        digests[path.name] = _digest(path)
    losses = folder / "losses.jsonl"
    losses.write_text("".join(checkpoint.losses), encoding="utf-8")
    digests[losses.name] = _digest(losses)
    state = {
        "format": _FORMAT,
        "step": checkpoint.step,
        "epoch": checkpoint.epoch,
        "position": checkpoint.position,
        "learning_rate": checkpoint.learning_rate,
        "loss_before": checkpoint.loss_before,
        "model": asdict(checkpoint.model),
        "data": checkpoint.data,
        "settings": dict(checkpoint.settings),
        "spent": checkpoint.spent.to_json(),
        "python_random": checkpoint.random.python,
        "method_state": dict(checkpoint.method_state),
        "observers": [dict(state) for state in checkpoint.observers],
        "sha256": digests,
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


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint back, every file checked against its digest.

    Raises:
        CheckpointError: A file is missing or damaged; the message names it.
    """
    state = _state(folder)
    try:
        if state["format"] != _FORMAT:
            raise CheckpointError(
                f"{folder} has format {state['format']}, this version reads {_FORMAT}: "
                "resume with the version that wrote it."
            )
        recorded = state.pop(_OWN_DIGEST, None)
        if recorded is not None and recorded != _digest_of_state(state):
            raise _damaged(folder / "state.json", "its SHA-256 differs from the one in it")
        for name, digest in state["sha256"].items():
            if _digest(folder / name) != digest:
                raise _damaged(folder / name, "its SHA-256 differs from the recorded one")
        tensors = {name: load_file(folder / f"{name}.safetensors") for name in _TENSOR_FILES}
        version, numbers, gauss = state["python_random"]
        return Checkpoint(
            step=int(state["step"]),
            epoch=int(state["epoch"]),
            position=int(state["position"]),
            model=ModelIdentity(**state["model"]),
            data=state["data"],
            settings=state["settings"],
            parameters=tensors["parameters"],
            optimizer=tensors["optimizer"],
            random=RandomState(
                (version, tuple(numbers), gauss), tensors["random"]["torch"], tensors["random"].get("device")
            ),
            losses=tuple((folder / "losses.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)),
            learning_rate=state["learning_rate"],
            loss_before=state["loss_before"],
            spent=Spent.from_json(state["spent"]),
            method_tensors=tensors["method"],
            method_state=state["method_state"],
            observers=tuple(state["observers"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder / "state.json", f"an entry is missing or of the wrong kind: {error}") from error
    except SafetensorError as error:
        raise _damaged(folder, str(error)) from error
    except OSError as error:
        raise _damaged(Path(error.filename or folder), error.strerror or str(error)) from error


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


def fixed_settings(config: TuningConfig, total: int, start: str | None) -> dict[str, Any]:
    """The options that a run may not change half-way.

    Args:
        config: The run's options.
        total: Its optimizer steps, which may change where nothing was planned by them.
        start: The digest of the adapter that it went on from.
    """
    settings = config.model_dump(mode="json", exclude=set(_FREE))
    planned = (
        config.schedule != "constant"
        or config.method == "adalora"
        or getattr(config, "site_policy", "") == "kill-revive"
    )
    return settings | {"total steps": total if planned else None, "the adapter to go on from": start}


def check_fits(
    checkpoint: Checkpoint, folder: Path, model: ModelIdentity, data: str, settings: Mapping[str, Any]
) -> None:
    """Refuse to go on with a checkpoint of another model, other data or other settings.

    Raises:
        CheckpointError: They differ; the message names both.
    """
    theirs = checkpoint.model
    for what, saved, wanted in (
        ("the model", theirs.name, model.name),
        ("the weights (digest)", theirs.digest, model.digest),
        ("the split plan", theirs.plan, model.plan),
        ("the span's dtype", theirs.span_dtype, model.span_dtype),
        ("the attention implementation", theirs.attn_implementation, model.attn_implementation),
        ("the emulator's package", theirs.package, model.package),
        ("the tokenized data (fingerprint)", checkpoint.data, data),
        *((name, checkpoint.settings.get(name), value) for name, value in settings.items()),
    ):
        if saved != wanted:
            raise CheckpointError(
                f"{folder} cannot be resumed: {what} was {saved!r} and is now {wanted!r}. "
                "Resume with what it was started with, or give another --out."
            )


def check_places(checkpoint: Checkpoint, folder: Path, parameters: Mapping[str, Tensor], n_observers: int) -> None:
    """Refuse a checkpoint whose parameters, or whose observers, are not those of this run.

    Raises:
        CheckpointError: A name, a shape or the number of observers differs.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    saved = {name: tuple(tensor.shape) for name, tensor in checkpoint.parameters.items()}
    if shapes != saved:
        name = next(name for name in [*shapes, *saved] if shapes.get(name) != saved.get(name))
        raise CheckpointError(
            f"{folder} cannot be resumed: {name} has shape {saved.get(name)} there and {shapes.get(name)} "
            "in this model. Resume with the model and method that it was started with."
        )
    if len(checkpoint.observers) != n_observers:
        raise CheckpointError(
            f"{folder} cannot be resumed: {len(checkpoint.observers)} observers have left their state there, and this "
            f"run has {n_observers}. Resume with those that it was started with."
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of_state(state: Mapping[str, Any]) -> str:
    """SHA-256 of the entries as JSON without layout, with what becomes of Python's tuples and keys in a file."""
    entries = json.loads(json.dumps(state))
    return hashlib.sha256(json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged ({why}): remove its checkpoint folder to resume from the one before, if there is one."
    )
