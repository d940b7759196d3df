"""What is trained: PEFT's methods on the edge's own layers, and plain tuning of these layers.

Everything goes through PEFT itself; this file chooses its configuration and keeps the few differences between methods
in one place (what AdaLoRA does after a step and remembers between steps, how an adapter is scored and saved).

Adapters are restricted by layer index to what the edge holds, and the saved adapter says so: loaded into the full
model, it touches the same layers. `build_peft(whole_model, config, layers=plan.edge_layers)` gives the same adapters in
one process.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import constants
from peft.utils.warning import PeftWarning
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from isthmus.backbone.checkpoint import read_json
from isthmus.backbone.edge_model import EDGE_WEIGHTS_INFO, load_edge_weights
from isthmus.backbone.errors import CheckpointError, ConfigError
from isthmus.backbone.files import new_folder
from isthmus.edge.config import TrainConfig

# Families that PEFT has no default for.
_LORA_DEFAULTS = {"phi3": ["qkv_proj"]}
_IA3_DEFAULTS = {"phi3": ["qkv_proj", "down_proj"]}
_IA3_FEEDFORWARD_DEFAULTS = {"phi3": ["down_proj"]}


def build_peft(
    model: Any, config: TrainConfig, *, total_steps: int | None = None, layers: Sequence[int] | None = None
) -> Any:
    """Make `model` trainable as `config.method` says.

    torch's random state is seeded with `config.seed` first, so equal models get equal adapters.

    Args:
        model: A transformers causal LM, whole or split.
        config: `method`, `rank`, `alpha`, `dropout`, `target_modules`, `virtual_tokens` and `seed` are used.
        total_steps: Steps of the run, which AdaLoRA plans its ranks by.
        layers: Decoder layers to adapt; by default those that the edge holds, or all layers of a whole model.

    Returns:
        A `PeftModel`, or `model` itself for the method `full`.

    Raises:
        ConfigError: No layer of the edge has such a module, or nothing would be trained.
    """
    plan = getattr(model, "split_plan", None)
    if layers is None and plan is not None:
        layers = plan.edge_layers
    if layers is not None and not layers and config.method != "prompt":
        raise ConfigError(
            f"method = {config.method!r} has no layer to work on, as the edge holds none: "
            "use method prompt, or a plan with edge layers."
        )
    torch.manual_seed(config.seed)
    if config.method == "full":
        return _unfreeze(model, layers)
    try:
        with _without_known_warnings():
            return peft.get_peft_model(model, _peft_config(model, config, layers, total_steps))
    except ValueError as error:
        targets = "the usual target modules" if config.target_modules is None else ", ".join(config.target_modules)
        reason = " ".join(str(error).split())
        raise ConfigError(f"method = {config.method!r} on {targets} does not fit this model: {reason}") from error


@contextmanager
def _without_known_warnings() -> Iterator[None]:
    """Without warnings of PEFT's own making, which the user can do nothing about."""
    with warnings.catch_warnings():
        # It asks transformers under a name that transformers is about to drop.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        # It writes AdaLoRA's ranks under the names of parameters and looks for modules when it reads them.
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
        # AdaLoRA may leave a module without any rank, which PEFT takes for weights that were not gathered.
        warnings.filterwarnings("ignore", ".*LoRA tensor.s. have invalid shape", PeftWarning)
        yield


def _unfreeze(model: Any, layers: Sequence[int] | None) -> Any:
    n_layers = model.config.num_hidden_layers
    stack = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers), None)
    if stack is None:
        raise ConfigError(
            f"method = 'full' finds no list of {n_layers} decoder layers in {type(model).__name__}: use lora."
        )
    model.requires_grad_(False)
    for index in range(n_layers) if layers is None else layers:
        stack[index].requires_grad_(True)
    return model


def _peft_config(model: Any, config: TrainConfig, layers: Sequence[int] | None, total_steps: int | None) -> Any:
    family = model.config.model_type
    causal = peft.TaskType.CAUSAL_LM
    if config.method == "prompt":
        return peft.PromptTuningConfig(task_type=causal, num_virtual_tokens=config.virtual_tokens)
    if config.method == "ia3":
        targets = _targets(config, constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING | _IA3_DEFAULTS, family)
        feedforward = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING | _IA3_FEEDFORWARD_DEFAULTS
        inner = [name for name in feedforward.get(family, []) if name in targets]
        # IA³ has no choice of layers, so the layers go into a pattern of names.
        pattern = _pattern(targets, layers) if layers is not None else targets
        return peft.IA3Config(
            task_type=causal, target_modules=pattern, feedforward_modules=inner, fan_in_fan_out=family == "gpt2"
        )
    common: dict[str, Any] = {
        "task_type": causal,
        "target_modules": _targets(
            config, constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING | _LORA_DEFAULTS, family
        ),
        "layers_to_transform": None if layers is None else list(layers),
        "fan_in_fan_out": family == "gpt2",  # its linear layers are stored transposed
    }
    if config.method == "vera":
        return peft.VeraConfig(r=config.rank, vera_dropout=config.dropout, projection_prng_key=config.seed, **common)
    common |= {"lora_alpha": config.alpha, "lora_dropout": config.dropout}
    if config.method == "adalora":
        total = total_steps or config.steps
        if total is None:
            raise ConfigError("method = 'adalora' plans its ranks by the number of steps: give --steps.")
        # The budget falls from one and a half times the rank, the proportion of PEFT's defaults; the first tenth of the
        # run is left to find out which directions matter, the last fifth to settle in the chosen ones.
        first = -(-3 * config.rank // 2)
        phases = {"tinit": total // 10, "tfinal": total // 5, "total_step": total}
        return peft.AdaLoraConfig(init_r=first, target_r=config.rank, **phases, **common)
    return peft.LoraConfig(r=config.rank, use_dora=config.method == "dora", **common)


def _targets(config: TrainConfig, defaults: dict[str, Any], family: str) -> list[str]:
    if config.target_modules is not None:
        return list(config.target_modules)
    if family not in defaults:
        raise ConfigError(
            f"there are no usual target modules for the family {family!r}: name them with --target-modules."
        )
    return list(defaults[family])


def _pattern(targets: Sequence[str], layers: Sequence[int]) -> str:
    """A pattern for PEFT: modules whose names end in one of `targets`, inside one of `layers`."""
    indices, names = "|".join(map(str, layers)), "|".join(map(re.escape, targets))
    return rf".*\.({indices})\.(.*\.)?({names})"


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer moves, by name.

    Raises:
        ConfigError: Nothing is trainable.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise ConfigError(
            "no parameter of the model is trainable: choose a method, or target modules that the edge holds."
        )
    return parameters


def scoring_model(model: Any) -> Any:
    """The module whose loss is the language model's alone: AdaLoRA's own forward adds a penalty to it."""
    return model.get_base_model() if _is_adalora(model) else model


def after_step(model: Any, step: int) -> None:
    """What the method does after the optimizer's step number `step` (from 1), while the gradients are still there."""
    if _allocator(model) is not None:
        model.base_model.update_and_allocate(step)


def method_state(model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the method remembers besides parameters: tensors and plain values."""
    allocator = _allocator(model)
    if allocator is None:
        return {}, {}
    averages = {f"{key}/{name}": value for key in _AVERAGES for name, value in getattr(allocator, key).items()}
    return averages, {"rank_pattern": allocator.peft_config.rank_pattern}


def load_method_state(model: Any, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """The inverse of `method_state`."""
    allocator = _allocator(model)
    if allocator is None:
        return
    device = next(iter(trained(model).values())).device
    for key in _AVERAGES:
        prefix = f"{key}/"
        found = {
            name.removeprefix(prefix): value.to(device) for name, value in tensors.items() if name.startswith(prefix)
        }
        setattr(allocator, key, found)
    allocator.peft_config.rank_pattern = values["rank_pattern"]


_PEFT_WEIGHTS = "adapter_model.safetensors"
_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def _allocator(model: Any) -> Any:
    """AdaLoRA's rank allocator, or `None` for every other method."""
    return model.base_model.rankallocator if _is_adalora(model) else None


def _is_adalora(model: Any) -> bool:
    return isinstance(model, peft.PeftModel) and model.peft_type == peft.PeftType.ADALORA


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter as a standard PEFT folder (for `full`: what the model itself saves), whole or not at all.

    A split model's adapter names the model as the cloud serves it, not the folder that the edge's parts lie in.

    Raises:
        DiskError: The disk is full or cannot be written.
    """
    # PEFT would otherwise ask the hub whether the base model's embedding has grown.
    options = {"save_embedding_layers": False} if isinstance(model, peft.PeftModel) else {}
    origin = getattr(model.get_base_model() if options else model, "isthmus_origin", None)
    if options and origin is not None:
        for settings in model.peft_config.values():
            settings.base_model_name_or_path = origin.checkpoint.name
    with new_folder(folder) as temporary, _without_known_warnings():
        model.save_pretrained(str(temporary), **options)


def _check_same_model(model: Any, folder: Path) -> None:
    """Names and shapes fit any model of the architecture, so plainly tuned layers are also held to their origin."""
    origin = getattr(model, "isthmus_origin", None)
    if origin is None:
        return  # a whole model, whose checkpoint is not known here
    tuned, ours = str(read_json(folder / EDGE_WEIGHTS_INFO).get("digest", "")), origin.checkpoint.digest()
    if tuned and ours and tuned != ours:
        raise CheckpointError(
            f"{folder} holds layers tuned on a model with the digest {tuned[:16]}, but this model's is {ours[:16]}: "
            "load them into the model that they were tuned on."
        )


def load_adapter(model: Any, folder: Path) -> Any:
    """Put what `save_adapter` wrote into a model, to evaluate it or to generate.

    Args:
        model: A transformers causal LM, whole or split, without an adapter.
        folder: A PEFT folder, or what an edge model with plainly tuned layers saved.

    Returns:
        A `PeftModel` in eval mode, or `model` itself, changed in place, for plainly tuned layers.

    Raises:
        CheckpointError: The folder is neither, is damaged, or holds something that has no place in this model.
    """
    if (folder / EDGE_WEIGHTS_INFO).is_file():
        _check_same_model(model, folder)
        load_edge_weights(model, folder)
        return model
    weights = folder / _PEFT_WEIGHTS
    # PEFT would look on the hub for what is not here, and read a pickle where there are no safetensors.
    for file in (folder / "adapter_config.json", weights):
        if not file.is_file():
            raise CheckpointError(
                f"{folder} is not an adapter ({file.name} is missing): give a folder that training wrote."
            )
    try:
        with safe_open(weights, framework="pt") as stored:
            names = set(stored.keys())
        with _without_known_warnings():
            loaded = peft.PeftModel.from_pretrained(model, str(folder))
            places = set(peft.get_peft_model_state_dict(loaded, save_embedding_layers=False))
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder} does not fit this model, or is damaged ({reason[:300]}).") from error
    # PEFT passes over what it finds no place for, and leaves at its start what it does not find.
    if names != places:
        name = min(names ^ places)
        fault = "which this model has no place for" if name in names else "which is missing there"
        raise CheckpointError(
            f"{folder} does not fit this model: {name}, {fault}. Load it into the model that it was made on."
        )
    return loaded
