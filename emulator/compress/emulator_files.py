"""An emulator's two files.

    emulator.json          {"format", "recipe", "keep", "layers"}: how it was made, and its layers in running order;
                           also "bridges", the places of its linear maps, if the recipe has them
    emulator.safetensors   each layer's tensors once, as `layers.<index in the whole model>.<name in the layer>`;
                           a linear map as `….bridge.weight` and `….bridge.bias` of the layer before it, or
                           `….entry.…` of the first layer; a factor of a low-rank layer as `….down` and `….up`; a
                           quantized weight as `….int8` or `….int4` and `….scale`

Shapes follow from these two and the model's configuration, and a file that has others is refused before it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from isthmus.backbone.checkpoints.assembly import check_materialised
from isthmus.backbone.checkpoints.tensor_reader import read_json, write_json
from isthmus.backbone.split.span import distinct_layers, empty_layers
from isthmus.common.errors import CheckpointError, IsthmusError, NonFiniteError
from isthmus.common.files import disk_errors
from isthmus.emulator.compress.bridges import add_bridges
from isthmus.emulator.compress.emulator_model import Emulator, Form
from isthmus.emulator.compress.recipe import EMULATOR_FILE, EMULATOR_INFO, Recipe
from isthmus.emulator.compress.svd import replace_linears
from isthmus.emulator.compress.weight_bits import from_stored, to_stored

_FORMAT = 1
_REMEDY = "get it again from the model's owner"
_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_FLOATING = frozenset({torch.float32, torch.bfloat16, torch.float16})


def save_emulator(emulator: Emulator, folder: Path) -> None:
    """Write `emulator.safetensors` and `emulator.json` into `folder`, a new one that is given its name afterwards.

    Weights that the recipe quantizes are written quantized; the emulator itself stays as it is (see
    `Emulator.quantize`).

    Raises:
        DiskError: The disk is full or cannot be written.
        NonFiniteError: A weight is NaN or infinite.
    """
    bits, rounded = emulator.recipe.bits, emulator.quantized_names()
    stored: dict[str, Tensor] = {}
    for name, tensor in emulator.tensors().items():
        weight = tensor.detach().cpu()
        if not weight.isfinite().all():
            raise NonFiniteError(f"the emulator's {name} is not finite; build it again, or distil it more gently")
        stored |= to_stored(name, weight, bits) if bits and name in rounded else {name: weight.contiguous()}
    info = {
        "format": _FORMAT,
        "recipe": str(emulator.recipe),
        "keep": emulator.recipe.keep,
        "layers": list(emulator.layers),
    }
    if emulator.recipe.bridged:
        info["bridges"] = list(emulator.bridges)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(stored, folder / EMULATOR_FILE, metadata={"format": "pt"})
        write_json(folder / EMULATOR_INFO, info)


def load_emulator(
    folder: Path, config: Any, *, attn_implementation: str | None = None, device: torch.device | str = "cpu"
) -> Emulator:
    """Read an emulator that `save_emulator` wrote. The files may come from anywhere: what does not fit is refused.

    Names, shapes and dtypes are compared with what the recipe and the configuration ask for before any tensor is read.
    In memory all weights are fp32, at which quantized ones are exact.

    Raises:
        CheckpointError: A file is missing, damaged, of another model, or holds a number that is not finite.
        ConfigError: The attention implementation does not fit the family.
        UnsupportedFamilyError: The architecture cannot be cut.
    """
    recipe, layers, bridges = _read_info(folder / EMULATOR_INFO, config)
    base = empty_layers(config, layers, dtype=torch.float32, attn_implementation=attn_implementation)
    distinct = distinct_layers(base, layers)
    if recipe.low_rank is not None:
        for layer in distinct.values():
            replace_linears(layer, recipe.low_rank)
    add_bridges(base, layers, bridges)
    emulator = Emulator(base, layers, recipe, config, bridges=bridges)
    values = _weights(folder / EMULATOR_FILE, emulator)
    for index, layer in distinct.items():
        prefix = f"layers.{index}."
        own = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        layer.load_state_dict(own, strict=True, assign=True)
    check_materialised(base)
    return emulator.trainable(False).to(device)


def _read_info(path: Path, config: Any) -> tuple[Recipe, tuple[int, ...], tuple[int, ...]]:
    info = read_json(path)
    bridges = info.pop("bridges", None)
    if info.get("format") != _FORMAT or info.keys() != {"format", "recipe", "keep", "layers"}:
        raise CheckpointError(f"{path} is not an emulator of format {_FORMAT}; {_REMEDY}")
    keep, layers = info["keep"], info["layers"]
    if not isinstance(info["recipe"], str) or isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise CheckpointError(f"{path}: recipe and keep are a text and a number; {_REMEDY}")
    try:
        recipe = Recipe.parse(info["recipe"], float(keep))
    except (IsthmusError, OverflowError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    n_layers = config.num_hidden_layers
    if (
        not isinstance(layers, list)
        or not 0 < len(layers) <= n_layers
        or not all(type(layer) is int and 0 <= layer < n_layers for layer in layers)
        or layers != sorted(layers)
    ):
        raise CheckpointError(f"{path}: its list of layers does not fit the model's {n_layers}; {_REMEDY}")
    if not _bridges_fit(bridges, layers, recipe):
        raise CheckpointError(f"{path}: its bridges do not fit its layers and its recipe; {_REMEDY}")
    return recipe, tuple(layers), tuple(bridges or ())


def _bridges_fit(bridges: Any, layers: list[int], recipe: Recipe) -> bool:
    """Whether `bridges`, of a file, is what `bridge_places` gives for some split plan with these layers."""
    if not recipe.bridged:
        return bridges is None
    if not isinstance(bridges, list) or not all(type(place) is int for place in bridges):
        return False
    first, last = layers[0], layers[-1]
    inner = [layer for layer, following in pairwise(layers) if following > layer + 1]
    before = [place for place in bridges if place < first]  # the middle begins after it, and not at the first layer
    after = [place for place in bridges if place >= last]
    return (
        len(set(layers)) == len(layers)
        and bridges == [*before, *inner, *after]
        and len(before) <= 1
        and all(-1 <= place < first - 1 for place in before)
        and (after == [last] or (not after and not recipe.closed))
    )


def _weights(path: Path, emulator: Emulator) -> dict[str, Tensor]:
    """The weights by their names in the emulator, in fp32."""
    bits = emulator.recipe.bits
    stored = read_tensors(path, emulator.stored_forms(), _REMEDY)
    values = {}
    for name, weight in emulator.tensors().items():
        if bits is None or name in stored:
            values[name] = stored[name].to(torch.float32, copy=True)
        else:  # only a quantized weight is not in the file by its own name
            values[name] = from_stored(name, stored, weight.shape[-1], bits)
    return values


def read_tensors(
    path: Path,
    forms: Mapping[str, Form],
    remedy: str,
    check: Callable[[Mapping[str, str]], None] = lambda _metadata: None,
) -> dict[str, Tensor]:
    """Read a safetensors file whose tensors are known by name, shape and dtype; whatever does not fit is refused.

    Args:
        forms: All tensors that the file must have.
        remedy: What the user can do about a file that does not fit; messages end with it.
        check: Called with the file's metadata before any of its tensors is looked at; may raise.

    Raises:
        CheckpointError: The file is missing or damaged, has other tensors, or holds a number that is not finite.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            check(file.metadata() or {})
            _check_forms(path, file, forms, remedy)
            stored: dict[str, Tensor] = {name: file.get_tensor(name) for name in forms}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {remedy}") from error
    for name, tensor in stored.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"tensor {name} in {path} is not finite; {remedy}")
    return stored


def _check_forms(path: Path, file: Any, forms: Mapping[str, Form], remedy: str) -> None:
    names = set(file.keys())
    if names != forms.keys():
        name = min(names ^ forms.keys())
        raise CheckpointError(f"{path} {'has a strange' if name in names else 'lacks the'} tensor {name!r}; {remedy}")
    for name, (shape, wanted) in forms.items():
        view = file.get_slice(name)
        found, dtype = tuple(view.get_shape()), _DTYPES.get(view.get_dtype())
        if found != shape or (dtype not in _FLOATING if wanted is None else dtype != wanted):
            raise CheckpointError(
                f"tensor {name} in {path} is {view.get_dtype()} {list(found)}, but the model asks for "
                f"{list(shape)} of {'a floating point dtype' if wanted is None else wanted}; "
                f"it belongs to another model: {remedy}"
            )
