"""The files of adapters that PEFT does not have: bottlenecks, tuned biases (BitFit), low-rank sites, ladders.

A model carries one of them in its own modules, under names that are the same in a split model and in the whole one, and
has its description as the attribute `isthmus_adapter`. On disk it is `isthmus_adapter.json` and
`adapter_model.safetensors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from isthmus.backbone.adapters.layer_adapters import LayerAdapter
from isthmus.backbone.checkpoints.tensor_reader import read_json, write_json
from isthmus.backbone.sites.ladder import LadderAdapter
from isthmus.backbone.sites.low_rank import LowRankAdapter
from isthmus.common.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from isthmus.backbone.split.edge_weights import EdgeOrigin

ADAPTER_WEIGHTS = "adapter_model.safetensors"
CUSTOM_INFO = "isthmus_adapter.json"

CustomAdapter = LayerAdapter | LowRankAdapter | LadderAdapter
_KINDS: dict[str, type[CustomAdapter]] = {
    "bottleneck": LayerAdapter,
    "bitfit": LayerAdapter,
    LowRankAdapter.method: LowRankAdapter,
    LadderAdapter.method: LadderAdapter,
}


def save_custom(model: Any, folder: Path, *, digest: str | None) -> None:
    """Write the adapter that the model carries as `isthmus_adapter.json` and its weights.

    Args:
        model: A model with the attribute `isthmus_adapter`.
    """
    adapter: CustomAdapter = model.isthmus_adapter
    origin: EdgeOrigin | None = getattr(model, "isthmus_origin", None)
    info = adapter.info()
    info["model"] = Path(model.name_or_path).name if origin is None else origin.checkpoint.name
    info["plan"] = "whole" if origin is None else str(origin.plan)
    info["digest"] = digest or ""
    tensors = {name: value.detach().cpu().contiguous() for name, value in adapter.parameters(model).items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CUSTOM_INFO, info)


def read_custom(folder: Path) -> CustomAdapter:
    """The adapter that `isthmus_adapter.json` in `folder` describes.

    Raises:
        CheckpointError: It is damaged.
    """
    path = folder / CUSTOM_INFO
    info = read_json(path)
    return _KINDS.get(str(info.get("method")), LayerAdapter).from_info(info, path)


def load_custom(model: Any, folder: Path, *, trainable: bool) -> Any:
    """Put what `save_custom` wrote into a model; see `isthmus.backbone.adapters.adapter_files.load_adapter`.

    Nothing is allocated or changed before every name and shape is known to fit.

    Raises:
        CheckpointError: The folder is damaged, or holds something that has no place in this model.
    """
    adapter = read_custom(folder)
    try:
        stored = _read_exactly(folder, adapter.places(model))
        adapter.attach(model)
    except ConfigError as error:
        raise CheckpointError(f"{folder} does not fit this model: {error}") from error
    model.requires_grad_(False)
    with torch.no_grad():
        for name, parameter in adapter.parameters(model).items():
            parameter.copy_(stored[name])
            parameter.requires_grad_(trainable)
    return model


def _read_exactly(folder: Path, places: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors of `folder`, if they are those of `places`, by name and shape, and no others."""
    require_files(folder, ADAPTER_WEIGHTS)
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            check_names(folder, set(file.keys()), set(places))
            for name, shape in places.items():
                found = list(file.get_slice(name).get_shape())
                if found != list(shape):
                    raise CheckpointError(
                        f"{folder} does not fit this model: {name} has shape {found} there and {list(shape)} here. "
                        "Load it into the model that it was made on."
                    )
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in places}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{folder / ADAPTER_WEIGHTS} is damaged ({error}): train it again, or copy it again."
        ) from error
    whole = next((name for name, tensor in tensors.items() if not tensor.is_floating_point()), None)
    if whole is not None:
        raise CheckpointError(f"{folder} does not fit this model: {whole} holds no floating point numbers.")
    return tensors


def require_files(folder: Path, *names: str) -> None:
    """Make sure that `folder` has files of these names.

    Raises:
        CheckpointError: One is missing.
    """
    for name in names:
        if not (folder / name).is_file():
            inside = folder / "adapter"  # of a run
            wanted = f"{inside}, which is in it" if inside.is_dir() else "a folder that training wrote"
            raise CheckpointError(f"{folder} is not an adapter ({name} is missing): give {wanted}.")


def check_names(folder: Path, names: set[str], places: set[str]) -> None:
    """Make sure that the stored names are those that the model has places for.

    Raises:
        CheckpointError: They are not.
    """
    strange = names ^ places
    if strange:
        name = min(strange)
        fault = "which this model has no place for" if name in names else "which is missing there"
        raise CheckpointError(
            f"{folder} does not fit this model: {name}, {fault}. Load it into the model that it was made on."
        )
