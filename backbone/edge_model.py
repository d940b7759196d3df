"""The class of the edge's model: its family's own class, with saving and generating fitted to what an edge holds."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from isthmus.backbone.checkpoint import WHOLE_FILE, TensorReader, read_json, write_json
from isthmus.backbone.errors import CheckpointError, UnsupportedCallError
from isthmus.backbone.families import Family
from isthmus.backbone.files import disk_errors
from isthmus.backbone.gate import SpanGate
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.sources import Checkpoint

# The options of a PEFT configuration that say which modules it adapts.
_PICKING = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "target_parameters",
    "feedforward_modules",
)

EDGE_WEIGHTS_INFO = "isthmus_edge.json"

# generate() options that need a cache, or a layer's inner values.
_NEEDS_CACHE = ("cache", "past_key_values", "cache_implementation", "assistant_model", "prompt_lookup_num_tokens")


@dataclass(frozen=True, slots=True)
class EdgeOrigin:
    """What an edge's model was made of.

    Attributes:
        checkpoint: The checkpoint that was read.
        family: The model's family.
        plan: The split plan.
        names: The tensors of the edge, by their names in the whole model; a tied one counts once.
        tied: Name -> name of the tensor that it shares.
        site_names: Modules of a cloud layer by their names inside the layer, such as `self_attn.q_proj`.
    """

    checkpoint: Checkpoint
    family: Family
    plan: SplitPlan
    names: frozenset[str]
    tied: dict[str, str]
    site_names: tuple[str, ...]


class EdgeModelMixin:
    """Stands before a transformers class in the edge model's bases; see `load_edge_parts`."""

    isthmus_origin: EdgeOrigin

    @property
    def split_plan(self) -> SplitPlan:
        """Who holds which layers."""
        return self.isthmus_origin.plan

    @property
    def span_gate(self) -> SpanGate:
        """The module that calls the span."""
        origin = self.isthmus_origin
        path = f"{origin.family.layers_path}.{origin.plan.bottom}"
        return cast(SpanGate, cast(nn.Module, self).get_submodule(path))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, without a key-value cache: each new token runs the whole sequence through the span.

        Raises:
            UnsupportedCallError: an option needs a cache.
        """
        config = kwargs.get("generation_config")
        asked = kwargs.get("use_cache", getattr(config, "use_cache", None))
        if asked:
            raise UnsupportedCallError("the split model generates without a key-value cache; leave out use_cache=True")
        for name in _NEEDS_CACHE:
            if kwargs.get(name, getattr(config, name, None)) is not None:
                raise UnsupportedCallError(
                    f"generate({name}=…) needs a key-value cache, which the split model lacks; leave it out"
                )
        return cast(Any, super()).generate(*args, **{**kwargs, "use_cache": False})

    def settle_before_forward(self, _base: nn.Module, _args: Any) -> None:
        """The hook that calls `settle_adapters`.

        On the base model, as AdaLoRA calls this one's `forward` past its hooks.
        """
        settle_adapters(self)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write what the edge holds, under the whole model's names; `load_edge_weights` puts it into a whole model.

        The folder has no `config.json`, so nothing takes it for a whole model. With adapters that transformers itself
        added (`add_adapter`), these are written instead, as transformers does.

        Args:
            save_directory: The folder; made if needed.
            is_main_process: Nothing is written where this is false.
            state_dict: What to write instead of the model's own state.
            push_to_hub: Refused.
            safe_serialization: Must be true: weights are written as safetensors only.
            **kwargs: Further arguments of transformers (sizes of shards, tokens for the hub) have no effect.

        Raises:
            DiskError: the disk is full or cannot be written.
            UnsupportedCallError: the state holds something else than the edge's tensors, such as an adapter's.
        """
        if push_to_hub or not safe_serialization:
            raise UnsupportedCallError("an edge's weights are written to a folder as safetensors; leave out the option")
        if getattr(self, "_hf_peft_config_loaded", False):
            cast(Any, super()).save_pretrained(
                save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs
            )
            return
        if is_main_process:
            _save(self, Path(save_directory), state_dict)


def _save(model: EdgeModelMixin, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
    origin = model.isthmus_origin
    state = cast(nn.Module, model).state_dict() if state_dict is None else state_dict
    expected = origin.names | origin.tied.keys()
    strange = sorted(state.keys() - expected)
    missing = sorted(origin.names - state.keys())
    if strange or missing:
        raise UnsupportedCallError(
            f"the model's state is not the edge's own (for example {(strange or missing)[0]}); "
            "save the PEFT model, or merge it"
        )
    tensors = {name: state[name].detach().cpu().contiguous() for name in sorted(origin.names)}
    try:
        digest = origin.checkpoint.digest()
    except CheckpointError:
        digest = ""  # the checkpoint is gone; what was learned must not be lost with it
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as temporary:
            written = Path(temporary) / WHOLE_FILE
            save_file(tensors, written, metadata={"format": "pt"})
            written.replace(folder / WHOLE_FILE)
        write_json(
            folder / EDGE_WEIGHTS_INFO, {"model": origin.checkpoint.name, "plan": str(origin.plan), "digest": digest}
        )


def load_edge_weights(full_model: nn.Module, folder: Path) -> None:
    """Put what an edge model's `save_pretrained` wrote into the whole model, in place.

    Args:
        full_model: The whole model of the same architecture.
        folder: The folder.

    Raises:
        CheckpointError: the folder holds something else, or a name or a shape does not fit. The model is then
            unchanged.
    """
    read_json(folder / EDGE_WEIGHTS_INFO)
    reader = TensorReader(folder)
    state = full_model.state_dict(keep_vars=True)
    for name in reader:
        if name not in state:
            raise CheckpointError(
                f"the model has no tensor {name}, which {folder} holds; load the model that it was cut from"
            )
        if reader.view(name).shape != state[name].shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(reader.view(name).shape)} in {folder} and "
                f"{list(state[name].shape)} in the model; load the model that it was cut from"
            )
    with torch.no_grad():
        for name in reader:
            state[name].copy_(reader.view(name))


def settle_adapters(model: EdgeModelMixin) -> None:
    """Make each PEFT configuration name exactly the modules that it adapts. Runs before every forward.

    PEFT matches names such as `q_proj` in the layers that the edge holds and skips the cloud's. On the whole model
    the same configuration would add adapters to every layer, so the edge's modules are written into it by their full
    names. Where a configuration picks a cloud layer by number, skipping it silently would be wrong.

    Raises:
        UnsupportedCallError: a configuration picks a cloud layer by number.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return
    settled: dict[str, tuple[Any, tuple[Any, ...]]] = model.__dict__.setdefault("_isthmus_settled", {})
    for adapter, config in configs.items():
        known, wanted = settled.get(adapter, (None, ()))
        if known is config and wanted == _wanted(config):
            continue
        numbered, everywhere = _matches(model.isthmus_origin, config)
        for layer, name in numbered:
            if layer in model.split_plan.cloud:
                raise UnsupportedCallError(
                    f"adapter {adapter!r} names {name}, but the cloud holds layers {model.split_plan.cloud}; "
                    f"choose among the edge's layers {', '.join(map(str, model.split_plan.edge_layers)) or '(none)'}"
                )
        if everywhere:
            modules = _adapted_modules(cast(nn.Module, model), adapter)
            feedforward = getattr(config, "feedforward_modules", None)  # IA3 has a second list, a part of the first
            if feedforward:
                config.feedforward_modules = {name for name in modules if _picks(feedforward, name)}
            config.target_modules = modules
        settled[adapter] = (config, _wanted(config))


def _wanted(config: Any) -> tuple[Any, ...]:
    """A copy of what a PEFT configuration picks modules by."""
    values = (getattr(config, name, None) for name in _PICKING)
    return tuple(value if value is None or isinstance(value, int | str) else frozenset(value) for value in values)


def _picks(wanted: str | Iterable[str], name: str) -> bool:
    """Whether a PEFT list of names, or its regular expression, means a module."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == each or name.endswith(f".{each}") for each in wanted)


def _matches(origin: EdgeOrigin, config: Any) -> tuple[list[tuple[int, str]], bool]:
    """The layers that a PEFT configuration picks by number, with a name each; whether it picks some in every layer.

    A layer is picked by number if a module of it is matched and the same module of some other layer is not.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    path, n_layers = origin.family.layers_path, origin.plan.n_layers
    numbered: list[tuple[int, str]] = []
    everywhere = False
    if getattr(config, "target_modules", None) is not None:
        for site in origin.site_names:
            names = [f"{path}.{layer}.{site}" for layer in range(n_layers)]
            matched = [layer for layer in range(n_layers) if check_target_module_exists(config, names[layer])]
            everywhere |= len(matched) == n_layers
            if len(matched) < n_layers:
                numbered += [(layer, names[layer]) for layer in matched]
    literal = (*(getattr(config, "modules_to_save", None) or ()), *(getattr(config, "target_parameters", None) or ()))
    numbered += [(layer, name) for layer in range(n_layers) for name in literal if f".{layer}." in f".{name}."]
    return numbered, everywhere


def _adapted_modules(model: nn.Module, adapter: str) -> set[str]:
    """Full names of the modules that carry `adapter`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        and any(adapter in getattr(module, part) for part in module.adapter_layer_names)
    }
