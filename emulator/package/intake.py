"""What a model owner takes from a tenant: the check of a returned adapter, before anything of it touches a model.

The folder comes from somebody who may be hostile, so everything is compared with what the edge's model, built without
weights, expects:

    1. known names of plain files, bounded in size;
    2. `isthmus_tuning.json` names this model, this plan, and the package;
    3. a PEFT configuration has the few options that training sets, in their ranges (peft_rules.py);
    4. exactly the tensors that such an adapter has on the edge's own layers, by name and shape;
    5. floating point numbers, all finite.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from isthmus.backbone.adapters.adapter_files import PEFT_INFO, TUNING_INFO, adapter_method, without_known_warnings
from isthmus.backbone.adapters.custom_adapters import ADAPTER_WEIGHTS, CUSTOM_INFO
from isthmus.backbone.adapters.layer_adapters import LayerAdapter
from isthmus.backbone.checkpoints.assembly import build_on_meta
from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.checkpoints.tensor_reader import EDGE_FILE, WHOLE_FILE
from isthmus.backbone.families import family_of
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_weights import EDGE_WEIGHTS_INFO
from isthmus.common.errors import AdapterError
from isthmus.emulator.package.peft_rules import held, is_int, is_layers, peft_config

# The file that describes a kind of adapter -> the file with its weights.
_KINDS = {PEFT_INFO: ADAPTER_WEIGHTS, CUSTOM_INFO: ADAPTER_WEIGHTS, EDGE_WEIGHTS_INFO: WHOLE_FILE}
ADAPTER_FILES = frozenset({*_KINDS, *_KINDS.values(), TUNING_INFO, "README.md"})
"""The files that a returned adapter may have."""

_MAX_JSON = 256 << 10
_MAX_HEADER = 4 << 20
SPARE_BYTES = 64 << 20
"""Of an adapter beside twice the edge's weights: where those are few, a soft prompt or a wide adapter may be larger."""
_FLOATS = ("F32", "F16", "BF16")
_RETURN = "return the folder that `isthmus emulator tune` wrote"

Places = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """A returned adapter that passed.

    Attributes:
        method: How it was made, as `--method` names it.
        n_params: Numbers in its tensors.
        package: Id of the package that it was tuned on; None for one made by split training.
    """

    method: str
    n_params: int
    size: int
    package: str | None


def check_adapter(
    folder: Path,
    packages: Collection[str],
    parts: Path,
    plan: SplitPlan,
    *,
    max_bytes: int | None = None,
    any_package: bool = False,
) -> AdapterSummary:
    """Check an adapter that a tenant returned. No model is touched; the edge's model is built without weights.

    Args:
        packages: Ids of the packages of which it must have been tuned on one. An adapter is also taken that was made
            by split training on the same model, whose `isthmus_tuning.json` names no package.
        parts: The edge's parts of the model: what `export_edge_parts` wrote, or a package.
        max_bytes: Most bytes of all its files; by default twice the edge's parts at fp32, plus 64 MiB.
        any_package: Take an adapter of any package of this model: for the tenant, who gets its own one back.

    Raises:
        AdapterError: It does not fit. The message has no path and no value of a tensor.
        CheckpointError: The edge's parts are damaged.
        PlanError: The plan is for another number of layers.
    """
    checkpoint = Checkpoint(parts, parts.name)
    model = _edge_on_meta(checkpoint, plan)
    if max_bytes is None:
        max_bytes = _most_bytes(model)
    info, size = _check_files(folder, max_bytes)
    made_on = _check_origin(folder, packages, checkpoint.digest(), plan, any_package)

    settings = _read(folder, info)
    if info == PEFT_INFO:
        places = _peft_places(model, settings, plan)
    else:
        _check_named(settings, {"digest": checkpoint.digest(), "plan": str(plan)}, info)
        places = _custom_places(model, settings, plan) if info == CUSTOM_INFO else _parts_places(parts)
    n_params = _check_tensors(folder / _KINDS[info], places)
    return AdapterSummary(adapter_method(folder), n_params, size, made_on)


def most_adapter_bytes(parts: Path, plan: SplitPlan) -> int:
    """Most bytes of an adapter's files, unless the model's owner says otherwise: twice the edge's parts, and 64 MiB.

    Raises:
        CheckpointError: The edge's parts are damaged.
        PlanError: The plan is for another number of layers.
    """
    return _most_bytes(_edge_on_meta(Checkpoint(parts, parts.name), plan))


def _most_bytes(model: Any) -> int:
    n_values: int = sum(parameter.numel() for parameter in model.parameters())
    return 2 * 4 * n_values + SPARE_BYTES


def _edge_on_meta(checkpoint: Checkpoint, plan: SplitPlan) -> Any:
    """The edge's model without weights: what the tensors of an adapter must fit."""
    config = checkpoint.config
    plan.check_layers(config.num_hidden_layers)
    family = family_of(config)
    model = build_on_meta(config, family, torch.float32, None)
    layers = model.get_submodule(family.layers_path)
    for layer in plan.cloud:
        layers[layer] = nn.Identity()
    return model


def _check_files(folder: Path, max_bytes: int) -> tuple[str, int]:
    """The file that says what kind of adapter it is, and the bytes of all files."""
    try:
        there = {entry.name: entry.lstat() for entry in folder.iterdir()}
    except OSError as error:
        raise AdapterError(f"the adapter cannot be read ({error.strerror}): {_RETURN}") from error
    for name, status in sorted(there.items()):
        if name not in ADAPTER_FILES:
            raise AdapterError(f"the adapter holds {name[:100]!r}, which is no file of an adapter: remove it")
        if not stat.S_ISREG(status.st_mode):
            raise AdapterError(f"{name} is not a plain file: put the file itself into the adapter")
        if name.endswith(".json") and status.st_size > _MAX_JSON:
            raise AdapterError(f"{name} has {status.st_size} bytes, more than {_MAX_JSON}: {_RETURN}")
    size = sum(status.st_size for status in there.values())
    if size > max_bytes:
        raise AdapterError(f"the adapter has {size} bytes, more than the {max_bytes} allowed: tune fewer weights")
    kinds = [name for name in _KINDS if name in there]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none of them"
        raise AdapterError(f"an adapter has one of {', '.join(_KINDS)}, this one has {found}: {_RETURN}")
    weights = {name for name in there if name.endswith(".safetensors")}
    if weights != {_KINDS[kinds[0]]}:
        found = " and ".join(sorted(weights)) or "none"
        raise AdapterError(f"weights belong into {_KINDS[kinds[0]]}, but the adapter has {found}: {_RETURN}")
    return kinds[0], size


def _check_origin(
    folder: Path, packages: Collection[str], digest: str, plan: SplitPlan, any_package: bool
) -> str | None:
    """Hold the adapter to what it was tuned on; returns the package's id that it names, if it names one."""
    if not (folder / TUNING_INFO).exists():
        raise AdapterError(f"{TUNING_INFO} is missing, which says what the adapter was tuned on: {_RETURN}")
    tuning = _read(folder, TUNING_INFO)
    _check_named(tuning, {"digest": digest}, TUNING_INFO)
    if tuning.get("plan") != str(plan):
        raise AdapterError(
            f"{TUNING_INFO} names the split plan {str(tuning.get('plan'))[:16]!r}, and this model is split {plan}: "
            "return the adapter to a cloud of its own split, or plug it with the package that it was tuned on "
            "(`isthmus emulator plug`)"
        )
    named = tuning.get("package")
    if named is None:
        return None
    if any_package or str(named) in packages:
        return str(named)
    if not packages:
        raise AdapterError(
            f"{TUNING_INFO} names a package ({str(named)[:16]}), but none is offered: "
            "ask the model's owner to offer the one that the adapter was tuned on"
        )
    offered = " or ".join(each[:16] for each in packages)
    raise AdapterError(
        f"the adapter was tuned on the package {str(named)[:16]}, not on {offered}: fetch the package again and tune "
        "on it"
    )


def _check_named(settings: Mapping[str, Any], wanted: Mapping[str, str], file: str) -> None:
    for key, value in wanted.items():
        if settings.get(key) != value:
            raise AdapterError(
                f"{file} names the {key} {str(settings.get(key))[:16]!r}, this model's is {value[:16]!r}: "
                "return an adapter that was tuned on this model and plan"
            )


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / name).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{name} is no JSON: {_RETURN}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{name} holds no JSON object: {_RETURN}")
    return value


# What the tensors must be ---------------------------------------------------------------------------------------------


def _parts_places(parts: Path) -> Places:
    """Tuned layers come with all that the edge holds, just as the edge's parts."""
    with safe_open(parts / EDGE_FILE, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _custom_places(model: Any, settings: Mapping[str, Any], plan: SplitPlan) -> Places:
    method, layers, width = settings.get("method"), settings.get("layers"), settings.get("width")
    if not is_layers(layers, plan):
        raise AdapterError(
            f"{CUSTOM_INFO} names the layers {str(layers)[:60]}, but the edge has {held(plan)}: {_RETURN}"
        )
    if method == "bitfit":
        adapter = LayerAdapter("bitfit", tuple(layers or ()))
    elif method == "bottleneck" and is_int(width, 1, model.config.hidden_size):
        adapter = LayerAdapter("bottleneck", tuple(layers or ()), width)
    else:
        raise AdapterError(
            f"{CUSTOM_INFO} has the method {str(method)[:40]!r} and the width {str(width)[:20]}: use bitfit, "
            f"or bottleneck with a width of 1 to {model.config.hidden_size}"
        )
    return {name: tuple(shape) for name, shape in adapter.places(model).items()}


def _peft_places(model: Any, settings: Mapping[str, Any], plan: SplitPlan) -> Places:
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = peft_config(settings, model.config.hidden_size, plan)
    if isinstance(config, peft.PromptTuningConfig):
        return {"prompt_embeddings": (config.num_virtual_tokens, model.config.hidden_size)}
    path = family_of(model.config).layers_path
    inside = tuple(f"base_model.model.{path}.{layer}." for layer in plan.edge_layers)
    try:
        with without_known_warnings():
            adapted = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise AdapterError(f"{PEFT_INFO} does not fit the model ({reason[:200]}): {_RETURN}") from error
    modules = [name for name, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)]
    for name in modules:
        if not name.startswith(inside):
            raise AdapterError(f"{PEFT_INFO} adapts {name}, but the edge has {held(plan)}: adapt modules of these")
    state = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    places = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if isinstance(config, peft.AdaLoraConfig):
        _apply_ranks(places, settings.get("rank_pattern"), config.init_r, modules)
    return places


def _apply_ranks(places: Places, pattern: Any, first: int, modules: list[str]) -> None:
    """AdaLoRA keeps, of each module's first ranks, those that its pattern marks."""
    if pattern is None:
        return
    known = {f"{module.removeprefix('base_model.model.')}.lora_E": module for module in modules}
    is_sound = (
        isinstance(pattern, dict)
        and pattern.keys() <= known.keys()
        and all(isinstance(marks, list) and len(marks) == first for marks in pattern.values())
        and all(isinstance(mark, bool) for marks in pattern.values() for mark in marks)
    )
    if not is_sound:
        raise AdapterError(f"rank_pattern in {PEFT_INFO} does not fit the adapted modules: {_RETURN}")
    for name, marks in pattern.items():
        module, rank = known[name], sum(marks)
        places[f"{module}.lora_A"] = (rank, *places[f"{module}.lora_A"][1:])
        places[f"{module}.lora_E"] = (rank, *places[f"{module}.lora_E"][1:])
        places[f"{module}.lora_B"] = (*places[f"{module}.lora_B"][:1], rank)


# The tensors ----------------------------------------------------------------------------------------------------------


def _check_tensors(path: Path, places: Places) -> int:
    """Compare names, types and shapes, then look at the numbers; returns how many there are."""
    with path.open("rb") as raw:
        if int.from_bytes(raw.read(8), "little") > _MAX_HEADER:
            raise AdapterError(
                f"{path.name} is damaged: its header is larger than {_MAX_HEADER} bytes; return it again"
            )
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in sorted(names ^ places.keys()):
                fault = "has no place in the edge's model" if name in names else "is missing"
                raise AdapterError(f"{name[:200]} in {path.name} {fault}: {_RETURN}")
            for name, shape in places.items():
                stored = file.get_slice(name)
                if stored.get_dtype() not in _FLOATS:
                    raise AdapterError(f"{name} is of type {stored.get_dtype()}: return one of {', '.join(_FLOATS)}")
                if tuple(stored.get_shape()) != shape:
                    raise AdapterError(
                        f"{name} has shape {list(stored.get_shape())}, but the edge's model has {list(shape)} there: "
                        "return an adapter that was tuned on this model"
                    )
            for name in places:
                if not bool(torch.isfinite(file.get_tensor(name)).all()):
                    raise AdapterError(f"{name} holds NaN or infinity: tune again with a lower learning rate")
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path.name} is damaged or truncated: return it again") from error
    return sum(math.prod(shape) for shape in places.values())
