"""Whether PEFT makes the same parameters of the split model as of the whole one.

The whole model's skeleton stands on torch's meta device, without memory, and PEFT wraps it with the same configuration.
What PEFT makes or unfreezes there and not here was dropped: a norm, a bias, a parameter that is named by itself.

A few methods read weights while they wrap, which the meta device has not. These wrap a narrow model with as many layers
and random weights in them, of which only the names of the wrapped modules are compared.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from isthmus.backbone.checkpoints.assembly import build_on_meta
from isthmus.backbone.families import family_of
from isthmus.backbone.peft_checks.allowed import is_adalora, peft_type
from isthmus.backbone.sites.edge_sites import adapters_of, is_peft_layer
from isthmus.common.errors import UnsupportedCallError

# Fields of PEFT's configurations that say what is trained.
_NAMING = ("target_parameters", "modules_to_save", "trainable_token_indices", "target_modules")

# Fields that change neither names nor shapes, and the values with which wrapping needs no weights and says nothing.
_PLAIN = {"init_lora_weights": True, "inference_mode": False, "progressbar": False}

_HEADS = 4  # of the narrow model

# What PEFT's methods raise on the meta device, and with configurations that do not fit a model.
_CANNOT = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, StopIteration)


def check_against_whole(model: Any, adapter: str, config: Any) -> None:
    """Compare what an adapter makes and unfreezes, here and on the whole model.

    torch's random state is left as it was.

    Args:
        model: The split language model, wrapped.
        adapter: The adapter's name.
        config: Its configuration, as PEFT has completed it.

    Raises:
        UnsupportedCallError: They differ, or PEFT cannot wrap the whole model.
    """
    whole = build_on_meta(model.config, family_of(model.config), torch.float32, None)
    originals = {name for name, _ in whole.named_parameters()}
    exact = _wrap(whole, adapter, config) is None
    if not exact:
        whole = _narrow_model(model.config)
        failure = _wrap(whole, adapter, config)
        if failure is not None:
            reason = " ".join(str(failure).split()) or type(failure).__name__
            raise UnsupportedCallError(
                f"{peft_type(config)} cannot be compared with what it does on the whole model ({reason[:200]}): check "
                "its configuration there, or use another method"
            ) from failure
    look = _parameters if exact else _places
    here, there = look(model, adapter, originals), look(whole, adapter, originals)
    if is_adalora(config):  # its ranks are those of `rank_pattern` once an adapter's weights are loaded
        here, there = dict.fromkeys(here, ""), dict.fromkeys(there, "")
    if here != there:
        name = min(dict(here.items() ^ there.items()))
        raise UnsupportedCallError(_differs(name, config, here.get(name), there.get(name)))
    names = {name for name, _ in model.named_parameters()}
    for name, parameter in whole.named_parameters():
        if parameter.requires_grad and name not in names and _original(name) in originals:
            raise UnsupportedCallError(_differs(name, config, None, tuple(parameter.shape)))


def _wrap(whole: nn.Module, adapter: str, config: Any) -> Exception | None:
    """Let PEFT wrap `whole` in place; what it raises where it cannot."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    settings = copy.deepcopy(config)
    for field, value in _PLAIN.items():
        if hasattr(settings, field):
            setattr(settings, field, value)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[settings.peft_type]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT has said it once, of the split model
        try:
            tuner(whole, {adapter: settings}, adapter)
        except _CANNOT as error:
            return error
    return None


def _narrow_model(config: Any) -> Any:
    """A model with the modules of `config`'s and few features, with random weights in its layers and none elsewhere."""
    narrow = copy.deepcopy(config)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = _HEADS * head
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    changes = {
        "hidden_size": width,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS if kv_heads == config.num_attention_heads else 1,
        "intermediate_size": 2 * width,
        "ffn_dim": 2 * width,
        "word_embed_proj_dim": width,
    }
    for field, value in changes.items():
        if getattr(config, field, None) is not None:
            setattr(narrow, field, value)
    if getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        narrow.word_embed_proj_dim = width // 2  # which makes projections
    family = family_of(narrow)
    model = build_on_meta(narrow, family, torch.float32, None)
    layers = getattr(model.get_submodule(family.base), family.layers).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.normal_(std=0.02, generator=generator)
    return model


def _parameters(model: nn.Module, adapter: str, originals: set[str]) -> dict[str, Any]:
    """Shapes of the parameters that are an adapter's, by name."""
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if f".{adapter}." in f"{name}." and _original(name) not in originals
    }


def _places(model: nn.Module, adapter: str, _originals: set[str]) -> dict[str, Any]:
    """Classes of the modules that PEFT has wrapped with an adapter, by name."""
    places = {}
    for name, module in model.named_modules():
        wrapper: Any = module
        has = adapters_of(module) if is_peft_layer(module) else getattr(wrapper, "_adapters", ())
        if type(module).__module__.startswith("peft.") and adapter in has:
            places[name] = type(module).__qualname__
    return places


def _original(name: str) -> str:
    """A parameter's name before PEFT wrapped its module."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _differs(name: str, config: Any, here: Any, there: Any) -> str:
    asked = _asks_for(name, config)
    remedy = "keep it to the edge's own layers (full names, or layers_to_transform), or leave it out"
    if asked.startswith("bias="):
        remedy = "use bias='none', or the method bitfit, which trains those of the edge's layers"
    if here is None:
        return f"{asked} trains {name} on the whole model, and its module is in the cloud: {remedy}"
    if there is None:
        return f"{asked} trains {name} here and not on the whole model: {remedy}"
    return f"{asked} makes {name} {_shown(here)} here and {_shown(there)} on the whole model: {remedy}"


def _asks_for(name: str, config: Any) -> str:
    """The part of a configuration that has `name` trained."""
    bias = getattr(config, "bias", "none")
    if name.endswith(".bias") and isinstance(bias, str) and bias != "none":
        return f"bias={bias!r}"
    for field in _NAMING:
        value = getattr(config, field, None) or ()
        entries = value if isinstance(value, Mapping | list | set | tuple) else [value]
        for entry in entries:
            if isinstance(entry, str) and entry.rpartition(".")[2] in name.split("."):
                return f"{field} with {entry!r}"
    return peft_type(config)


def _shown(found: Any) -> str:
    return str(list(found)) if isinstance(found, tuple) else str(found)
