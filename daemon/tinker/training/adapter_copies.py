"""Copies of what a model has learned: an adapter's folder, as `save_adapter` writes it, perhaps with moments beside it.

adapter_config.json, adapter_model.safetensors, isthmus_tuning.json    the adapter
optimizer.safetensors                                                  the optimizer's moments
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from isthmus.backbone.adapters.adapter_files import PEFT_INFO, TUNING_INFO, save_adapter
from isthmus.backbone.adapters.custom_adapters import ADAPTER_WEIGHTS
from isthmus.backbone.checkpoints.tensor_reader import read_json
from isthmus.common.errors import CheckpointError
from isthmus.common.files import new_folder

_MOMENTS = "optimizer.safetensors"
_RANK, _ALPHA = "r", "lora_alpha"


def write_copy(model: Any, folder: Path, record: Mapping[str, Any], moments: Mapping[str, Tensor] | None) -> None:
    """Write an adapter, and moments where there are any, whole or not at all.

    Args:
        model: A `PeftModel`.
        record: As for `save_adapter`.
        moments: By names of parameters.

    Raises:
        DiskError: It cannot be written.
    """
    with new_folder(folder) as temporary:
        save_adapter(model, temporary, record=record)
        if moments is not None:
            save_file({name: value.contiguous() for name, value in moments.items()}, temporary / _MOMENTS)


def read_copy(
    model: Any, parameters: Mapping[str, Tensor], folder: Path, digest: str, moments: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `write_copy` wrote, for a model with a LoRA of the same shape.

    Args:
        model: A `PeftModel`.
        parameters: What is trained of it, by name.
        digest: Its base model's.
        moments: Whether they are wanted.

    Returns:
        Values by names of parameters; and moments, none where they are not wanted.

    Raises:
        CheckpointError: It is damaged, does not fit, or has no moments where they are wanted.
    """
    made_on = read_json(folder / TUNING_INFO).get("digest")
    if made_on != digest:
        raise CheckpointError(f"{folder} was trained on another base model: create a model of that one")
    config, own = read_json(folder / PEFT_INFO), model.active_peft_config
    for field in (_RANK, _ALPHA):
        if config.get(field) != getattr(own, field):
            raise CheckpointError(
                f"{folder} has {field} {config.get(field)}, and this model {getattr(own, field)}: create a model with "
                "the LoRA that it was saved with"
            )
    stored = _tensors(folder / ADAPTER_WEIGHTS)
    # PEFT leaves the adapter's own name out of the names in a file.
    names = {name.replace(f".{model.active_adapter}.", "."): name for name in parameters}
    values = {names.get(name, name): value for name, value in stored.items()}
    _check(folder, {name: each.shape for name, each in parameters.items()}, values)
    if not moments:
        return values, {}
    if not (folder / _MOMENTS).is_file():
        raise CheckpointError(f"{folder} was saved without the optimizer's state: load it without")
    found = _tensors(folder / _MOMENTS)
    for key, value in found.items():
        name, _, moment = key.rpartition("/")
        shape = () if moment == "step" else getattr(parameters.get(name), "shape", None)
        if shape is None or value.shape != shape:
            raise CheckpointError(f"{folder / _MOMENTS} has {key[:100]!r}, which has no place in this model")
    return values, found


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): save it again") from error
    return tensors


def _check(folder: Path, wanted: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
    there = {name: value.shape for name, value in values.items()}
    if there == wanted:
        return
    name = next(name for name in [*wanted, *there] if wanted.get(name) != there.get(name))
    raise CheckpointError(
        f"{folder} does not fit: {name} has shape {_shape(there.get(name))} there and {_shape(wanted.get(name))} in "
        "this model: create a model with the LoRA that it was saved with"
    )


def _shape(shape: Any) -> str:
    return "none" if shape is None else str(tuple(shape))
