"""The methods of `--method`: what each makes trainable, and what it does around a step.

PEFT builds the adapters of its own methods; this file chooses their configuration. It also has the few differences
between methods: AdaLoRA's work after a step and its state, and how an adapter is scored.

Adapters go to the edge's layers, and to the cloud's layers that `config.sites` names. PEFT gets the full names of their
modules, so a saved adapter touches the same modules when it is loaded into the full model.
`build_peft(whole_model, config, layers=plan.edge_layers)` gives the same adapters in one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import constants
from torch import Tensor, nn

from isthmus.backbone.adapters.adapter_files import (
    adapter_method,
    load_adapter,
    unfreeze_layers,
    without_known_warnings,
)
from isthmus.backbone.adapters.layer_adapters import add_bottlenecks, decoder_layers, unfreeze_biases
from isthmus.backbone.plan import Span, SplitPlan
from isthmus.backbone.sites.bottleneck import Bottleneck
from isthmus.backbone.sites.ladder import add_ladder
from isthmus.backbone.sites.low_rank import add_low_rank
from isthmus.common.errors import ConfigError
from isthmus.edge.config.training_config import TrainConfig, TuningConfig

# Families that PEFT has no default for.
_LORA_DEFAULTS = {"phi3": ["qkv_proj"]}
_IA3_DEFAULTS = {"phi3": ["qkv_proj", "down_proj"]}
_IA3_FEEDFORWARD_DEFAULTS = {"phi3": ["down_proj"]}


def build_peft(
    model: Any,
    config: TuningConfig,
    *,
    total_steps: int | None = None,
    layers: Sequence[int] | None = None,
    beside: SplitPlan | None = None,
    also: Sequence[str] = (),
) -> Any:
    """Make `model` trainable as `config.method` says.

    torch's random state is seeded with `config.seed` first, so equal models get equal adapters.

    Args:
        config: `method`, `rank`, `alpha`, `dropout`, `target_modules`, `virtual_tokens`, `seed`, `start_from` and, of a
            `TrainConfig`, `sites` are used.
        total_steps: Steps of the run; AdaLoRA plans its ranks by them.
        layers: Decoder layers to adapt; by default the edge's, or all layers of a whole model. An adapter to go on from
            has its own.
        beside: The plan whose cloud layers a ladder reads; by default the split model's own.
        also: Further linears that get an adapter, the head say, by their full names.

    Returns:
        A `PeftModel`, or `model` itself for the methods that PEFT does not have.

    Raises:
        CheckpointError: The adapter to go on from does not fit the model.
        ConfigError: No chosen layer has such a module, a layer of `sites` is not the cloud's or has no module to adapt,
            or the adapter to go on from was made by another method.
    """
    plan = getattr(model, "split_plan", None)
    own_layers = layers
    if own_layers is None:
        own_layers = range(model.config.num_hidden_layers) if plan is None else plan.edge_layers
    interior = _interior_layers(config, plan)
    if not own_layers and not interior and config.method not in ("prompt", "ladder"):
        raise ConfigError(
            f"method = {config.method!r} has no layer to work on, as the edge holds none: "
            "use method prompt, or a plan with edge layers."
        )
    torch.manual_seed(config.seed)
    if config.start_from is not None:
        return _go_on(model, config, config.start_from)
    match config.method:
        case "full":
            unfreeze_layers(model, own_layers)
        case "bottleneck":
            add_bottlenecks(model, sorted({*own_layers, *interior}), config.rank, dropout=config.dropout)
        case "bitfit":
            unfreeze_biases(model, own_layers)
        case "ladder":
            span, taps = _tapped_layers(beside or plan, config)
            add_ladder(model, taps, span=span, reduction=config.reduction, tap_width=config.tap_width, seed=config.seed)
        case "prompt":
            return peft.get_peft_model(model, _prompt_config(model, config))
        case _:
            return _adapt_linears(model, config, own_layers, interior, total_steps, also)
    return model


def _adapt_linears(
    model: Any,
    config: TuningConfig,
    own_layers: Sequence[int],
    interior: Sequence[int],
    total_steps: int | None,
    also: Sequence[str],
) -> Any:
    """Give the target modules of these layers, and those of `also`, an adapter each; see `build_peft`."""
    targets = _targets(config, model.config.model_type)
    names = _modules_in(model, interior, targets)
    if interior and not names:
        raise ConfigError(
            f"sites = {_sites_text(config)}: this model has no sites in the cloud's layers: give --sites none."
        )
    names |= _modules_in(model, own_layers, targets) | set(also)
    if not names:
        raise ConfigError(
            f"method = {config.method!r} finds no module named {', '.join(targets)} in the layers that it works on: "
            "give other --target-modules."
        )
    if config.method == "low_rank":
        in_order = [name for name, _ in model.named_modules() if name in names]
        add_low_rank(model, in_order, config.rank, alpha=config.alpha, seed=config.seed, init=config.basis)
        return model
    try:
        with without_known_warnings():
            tuned = peft.get_peft_model(model, _peft_config(model, config, names, total_steps))
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"method = {config.method!r} on {', '.join(targets)} does not fit this model: {reason}"
        ) from error
    # PEFT shortens a long list to what tells the modules apart in this model, which need not do so in the whole one.
    tuned.active_peft_config.target_modules = set(names)
    return tuned


def _go_on(model: Any, config: TuningConfig, adapter: Path) -> Any:
    """`model` with the adapter of an earlier run, trainable."""
    made_by = adapter_method(adapter)
    if made_by != config.method:
        raise ConfigError(
            f"start_from = {str(adapter)!r} was made by method {made_by}, not {config.method}: "
            f"give --method {made_by}, or start without it."
        )
    if made_by == "adalora":
        raise ConfigError(
            "method = 'adalora' cannot go on from an adapter, as its ranks were planned for the run that made it: "
            "start without --start-from."
        )
    loaded = load_adapter(model, adapter, trainable=True)
    for module in loaded.modules():
        if isinstance(module, Bottleneck):
            module.dropout.p = config.dropout  # a setting of the run, which the adapter does not keep
    return loaded


def _interior_layers(config: TuningConfig, plan: Any) -> Sequence[int]:
    """The cloud's layers that `config.sites` names."""
    sites = config.sites if isinstance(config, TrainConfig) else "none"
    if sites == "none":
        return ()
    cloud = () if plan is None else tuple(plan.cloud)
    if not cloud:
        raise ConfigError(f"sites = {_sites_text(config)}: the cloud holds no layer of this model: give --sites none.")
    if sites == "all":
        return cloud
    strange = [layer for layer in sites if layer not in cloud]
    if strange:
        raise ConfigError(
            f"sites = {_sites_text(config)}: layer {strange[0]} is not the cloud's, which holds layers {cloud[0]} to "
            f"{cloud[-1]}: name some of these; the edge's own layers have adapters anyway."
        )
    return sites


def _tapped_layers(plan: SplitPlan | None, config: TuningConfig) -> tuple[Span, list[int]]:
    """The cloud's layers, and `config.taps` of them at even distances, which end with the last one."""
    if plan is None or not len(plan.cloud):
        raise ConfigError("method = 'ladder' stands beside the cloud's layers, and there are none: use another method.")
    n = len(plan.cloud)
    if config.taps > n:
        raise ConfigError(f"taps = {config.taps}: the cloud holds {n} layers: give at most these.")
    return plan.cloud, [plan.cloud.start + (i + 1) * n // config.taps - 1 for i in range(config.taps)]


def _sites_text(config: TuningConfig) -> str:
    sites = config.sites if isinstance(config, TrainConfig) else "none"
    return sites if isinstance(sites, str) else ",".join(map(str, sites))


def _modules_in(model: Any, layers: Iterable[int], targets: Sequence[str]) -> set[str]:
    """Full names of the modules inside `layers` whose names are, or end in, one of `targets`."""
    path, stack = decoder_layers(model)
    inside = (f"{path}.{index}.{name}" for index in layers for name, _ in stack[index].named_modules() if name)
    return {name for name in inside if _is_one_of(name, targets)}


def _is_one_of(name: str, targets: Sequence[str]) -> bool:
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _targets(config: TuningConfig, family: str) -> Sequence[str]:
    """The modules that get an adapter, by short names."""
    if config.target_modules is not None:
        return config.target_modules
    if config.method == "ia3":
        defaults = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING | _IA3_DEFAULTS
    else:
        defaults = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING | _LORA_DEFAULTS
    if family not in defaults:
        raise ConfigError(
            f"there are no usual target modules for the family {family!r}: name them with --target-modules."
        )
    return list(defaults[family])


def _prompt_config(model: Any, config: TuningConfig) -> Any:
    if getattr(model.config, "word_embed_proj_dim", model.config.hidden_size) != model.config.hidden_size:
        raise ConfigError(
            "method = 'prompt' learns rows as wide as the hidden states, and this model's embedding has rows of "
            f"{model.config.word_embed_proj_dim}: use another method."
        )
    return peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=config.virtual_tokens)


def _peft_config(model: Any, config: TuningConfig, names: set[str], total_steps: int | None) -> Any:
    """PEFT's configuration of the method, for the modules with these full names."""
    family = model.config.model_type
    common: dict[str, Any] = {
        "task_type": peft.TaskType.CAUSAL_LM,
        "target_modules": set(names),
        "fan_in_fan_out": family == "gpt2",  # its linear layers are stored transposed
    }
    if config.method == "ia3":
        feedforward = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING | _IA3_FEEDFORWARD_DEFAULTS
        inner = {name for name in names if _is_one_of(name, feedforward.get(family, []))}
        return peft.IA3Config(feedforward_modules=inner, **common)
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


_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def _allocator(model: Any) -> Any:
    """AdaLoRA's rank allocator, or `None` for every other method."""
    return model.base_model.rankallocator if _is_adalora(model) else None


def _is_adalora(model: Any) -> bool:
    return isinstance(model, peft.PeftModel) and model.peft_type == peft.PeftType.ADALORA
