"""Adapters that PEFT has not: bottlenecks behind layers, the biases inside them (BitFit), low-rank sites, ladders.

A model carries one of them in its own modules, under names that are the same in a split model and in the whole one, and
says which in its attribute `isthmus_adapter`. On disk it is `isthmus_adapter.json` and `adapter_model.safetensors`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from isthmus.backbone.checkpoints.tensor_reader import read_json, write_json
from isthmus.backbone.sites.bottleneck import BOTTLENECK, Bottleneck, attach_bottleneck
from isthmus.backbone.sites.ladder import LadderAdapter
from isthmus.backbone.sites.low_rank import LowRankAdapter
from isthmus.backbone.split.remote_layers import SitedSpan
from isthmus.common.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from isthmus.backbone.split.edge_model import EdgeOrigin

ADAPTER_WEIGHTS = "adapter_model.safetensors"
OWN_INFO = "isthmus_adapter.json"

_WIDEST = 1 << 20

# Adapters that describe and attach themselves, by their method.
_SELF_MADE: dict[str, type[LowRankAdapter] | type[LadderAdapter]] = {
    kind.method: kind for kind in (LowRankAdapter, LadderAdapter)
}


@dataclass(frozen=True, slots=True)
class OwnAdapter:
    """An adapter that PEFT has not. A model that carries one has it as its attribute `isthmus_adapter`.

    Attributes:
        method: `bottleneck` or `bitfit`.
        layers: The decoder layers that it is on, by their indices in the whole model.
        width: Width of the bottlenecks; None for `bitfit`.
    """

    method: str
    layers: tuple[int, ...]
    width: int | None = None


AnyOwn = OwnAdapter | LowRankAdapter | LadderAdapter


def add_bottlenecks(model: Any, layers: Sequence[int], width: int, *, dropout: float = 0.0) -> None:
    """Put a bottleneck adapter behind each of `layers`; they alone are trainable then (Houlsby et al. 2019).

    Args:
        model: A transformers causal LM, whole or split.
        layers: Decoder layers by their indices in the whole model.
        width: Width of the narrow part.
        dropout: Dropout in front of it.

    Raises:
        ConfigError: A layer has one already, or the model has no list of decoder layers.
    """
    _, stack = decoder_layers(model)
    model.requires_grad_(False)
    for index in layers:
        attach_bottleneck(stack[index], Bottleneck(model.config.hidden_size, width, dropout))
    model.isthmus_adapter = OwnAdapter("bottleneck", tuple(layers), width)


def unfreeze_biases(model: Any, layers: Sequence[int]) -> None:
    """Make the biases inside `layers` trainable, and nothing else (BitFit, Ben Zaken et al. 2022).

    Raises:
        ConfigError: The layers have no biases, or the model has no list of decoder layers.
    """
    adapter = OwnAdapter("bitfit", tuple(layers))
    biases = own_parameters(model, adapter)
    if not biases:
        raise ConfigError(
            f"method = 'bitfit' tunes biases, and the layers of this {model.config.model_type} model have none: "
            "use method lora or bottleneck."
        )
    model.requires_grad_(False)
    for bias in biases.values():
        bias.requires_grad_(True)
    model.isthmus_adapter = adapter


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its path in the model, such as `model.layers`.

    Raises:
        ConfigError: There is no list of so many layers.
    """
    n_layers = model.config.num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return path, module
    raise ConfigError(f"there is no list of {n_layers} decoder layers in {type(model).__name__}: use method lora.")


def own_parameters(model: Any, adapter: AnyOwn) -> dict[str, nn.Parameter]:
    """The parameters that belong to `adapter`, by their names in the whole model."""
    if not isinstance(adapter, OwnAdapter):
        return adapter.parameters(model)
    path, stack = decoder_layers(model)
    found: dict[str, nn.Parameter] = {}
    for index in adapter.layers:
        for name, parameter in stack[index].named_parameters():
            in_block = name.startswith(f"{BOTTLENECK}.")
            wanted = in_block if adapter.method == "bottleneck" else name.endswith(".bias") and not in_block
            if wanted:
                found[f"{path}.{index}.{name}"] = parameter
    return found


def save_own(model: Any, folder: Path, *, digest: str | None) -> None:
    """Write the adapter that the model carries as `isthmus_adapter.json` and its weights.

    Args:
        model: A model with the attribute `isthmus_adapter`.
        folder: An existing folder.
        digest: The digest of the model that a split one was cut from, where it is known.
    """
    own: AnyOwn = model.isthmus_adapter
    origin: EdgeOrigin | None = getattr(model, "isthmus_origin", None)
    info = _description(own)
    info["model"] = Path(model.name_or_path).name if origin is None else origin.checkpoint.name
    info["plan"] = "whole" if origin is None else str(origin.plan)
    info["digest"] = digest or ""
    tensors = {name: value.detach().cpu().contiguous() for name, value in own_parameters(model, own).items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    write_json(folder / OWN_INFO, info)


def _description(own: AnyOwn) -> dict[str, Any]:
    if not isinstance(own, OwnAdapter):
        return own.info()
    width = {} if own.width is None else {"width": own.width}
    return {"method": own.method, "layers": list(own.layers), **width}


def read_own(folder: Path) -> AnyOwn:
    """What `isthmus_adapter.json` in `folder` says.

    Raises:
        CheckpointError: It is damaged.
    """
    info = read_json(folder / OWN_INFO)
    method, layers, width = info.get("method"), info.get("layers"), info.get("width")
    if isinstance(method, str) and method in _SELF_MADE:
        return _SELF_MADE[method].from_info(info, folder / OWN_INFO)
    is_sound = (
        method in ("bottleneck", "bitfit")
        and isinstance(layers, list)
        and layers
        and all(type(index) is int and index >= 0 for index in layers)
        and len(set(layers)) == len(layers)
        and (method == "bitfit" or (type(width) is int and 1 <= width <= _WIDEST))
    )
    if not is_sound:
        raise CheckpointError(
            f"{folder / OWN_INFO} is damaged (method {method!r}, layers {str(layers)[:60]}, width {width!r}): "
            "give a folder that training wrote."
        )
    return OwnAdapter(str(method), tuple(layers or ()), width if method == "bottleneck" else None)


def load_own(model: Any, folder: Path, *, trainable: bool) -> Any:
    """Put what `save_own` wrote into a model; see `isthmus.backbone.adapters.adapter_files.load_adapter`.

    Nothing is allocated or changed before every name and shape is known to fit.

    Raises:
        CheckpointError: The folder is damaged, or holds something that has no place in this model.
    """
    own = read_own(folder)
    try:
        places = _places(model, own, folder) if isinstance(own, OwnAdapter) else own.places(model)
    except ConfigError as error:
        raise CheckpointError(f"{folder} does not fit this model: {error}") from error
    stored = _read_exactly(folder, places)
    if not isinstance(own, OwnAdapter):
        own.attach(model)
    elif own.method == "bottleneck":
        add_bottlenecks(model, own.layers, own.width or 1)
    else:
        model.isthmus_adapter = own
    model.requires_grad_(False)
    with torch.no_grad():
        for name, parameter in own_parameters(model, own).items():
            parameter.copy_(stored[name])
            parameter.requires_grad_(trainable)
    return model


def _places(model: Any, own: OwnAdapter, folder: Path) -> dict[str, torch.Size]:
    """Names and shapes of the tensors that the model has a place for; nothing is allocated yet."""
    plan = getattr(model, "split_plan", None)
    held = range(model.config.num_hidden_layers)
    if plan is not None and not (own.method == "bottleneck" and isinstance(model.span_gate.span, SitedSpan)):
        held = plan.edge_layers
    for index in own.layers:
        if index not in held:
            raise CheckpointError(
                f"{folder} has an adapter on layer {index}, which this model lacks; it holds layers "
                f"{', '.join(map(str, held)) or '(none)'}. Load it into a model that has it."
            )
    if own.method == "bitfit":
        return {name: parameter.shape for name, parameter in own_parameters(model, own).items()}
    path, _ = decoder_layers(model)
    with torch.device("meta"):
        block = Bottleneck(model.config.hidden_size, own.width or 1)
    return {
        f"{path}.{index}.{BOTTLENECK}.{name}": parameter.shape
        for index in own.layers
        for name, parameter in block.named_parameters()
    }


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
            raise CheckpointError(f"{folder} is not an adapter ({name} is missing): give a folder that training wrote.")


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
