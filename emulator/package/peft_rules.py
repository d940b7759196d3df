"""Which options of a PEFT configuration are taken from a stranger, and in which ranges.

PEFT's own loading is made for friends: a configuration may pick modules by a regular expression, name further files, or
ask for decompositions that take hours. Here the options that training sets have their ranges, and every other one must
be at PEFT's default.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from isthmus.backbone.adapters.adapter_files import PEFT_INFO
from isthmus.backbone.checkpoints.hub import COMMIT
from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import AdapterError

_MAX_PROMPT = 4096
_MAX_NAMES = 4096
_MAX_NAMES_IN_PATTERN = 64
_LARGEST = 1e12
_RETURN = "return the folder that `isthmus emulator tune` wrote"
# The one pattern that training itself writes (IA3 has no choice of layers), with the layers and the modules' names.
# PEFT tries each pair of the two on each module: a layer that stands there many times would keep it busy for hours.
_LAYERS_AND_NAMES = re.compile(
    r"\.\*\\\.\((\d{1,5}(?:\|\d{1,5})*)\)\\\.\(\.\*\\\.\)\?\((\w+(?:(?:\||\\\.)\w+)*)\)", re.ASCII
)
_MODULE = re.compile(r"\w+(?:\.\w+)*", re.ASCII)


def peft_config(settings: Mapping[str, Any], hidden_size: int, plan: SplitPlan) -> Any:
    """The configuration that the settings of an `adapter_config.json` describe.

    Args:
        hidden_size: Width of the model, which a rank may not exceed.
        plan: Who holds which layers; only the edge's may be named.

    Returns:
        A `PeftConfig` of the settings' type, without AdaLoRA's pattern of ranks.

    Raises:
        AdapterError: An option is not taken, or not in its range.
    """
    import peft

    def is_rank(value: Any) -> bool:
        return is_int(value, 1, hidden_size)

    common: dict[str, Callable[[Any], bool]] = {
        "peft_type": lambda _: True,
        "task_type": lambda value: value == "CAUSAL_LM",
        "peft_version": _is_text,
        "base_model_name_or_path": _is_text,
        "revision": _is_commit,
        "inference_mode": _is_flag,
    }
    layered: dict[str, Callable[[Any], bool]] = {
        "target_modules": lambda value: _is_targets(value, settings.get("layers_to_transform"), plan),
        "layers_to_transform": lambda value: value is None or is_layers(value, plan),
        "fan_in_fan_out": _is_flag,
    }
    lora = layered | {
        "r": is_rank,
        "lora_alpha": _is_number,
        "lora_dropout": _is_share,
        "init_lora_weights": _is_flag,
        "use_rslora": _is_flag,
        "use_dora": _is_flag,
    }
    kinds: dict[str, tuple[Any, dict[str, Callable[[Any], bool]]]] = {
        "LORA": (peft.LoraConfig, lora),
        "ADALORA": (
            peft.AdaLoraConfig,
            lora
            | {"r": lambda value: is_int(value, 1, 1 << 20)}  # not used; PEFT leaves its default there
            | dict.fromkeys(("init_r", "target_r"), is_rank)
            | dict.fromkeys(("beta1", "beta2"), _is_share)
            | dict.fromkeys(("deltaT", "tinit", "tfinal", "total_step"), _is_count)
            | {"orth_reg_weight": _is_number, "rank_pattern": lambda _: True},
        ),
        "VERA": (
            peft.VeraConfig,
            layered
            | {
                "r": is_rank,
                "vera_dropout": _is_share,
                "projection_prng_key": lambda value: is_int(value, 0, (1 << 63) - 1),
                "d_initial": _is_number,
                "save_projection": lambda value: value is True,
                "init_weights": _is_flag,
            },
        ),
        "IA3": (peft.IA3Config, layered | {"feedforward_modules": _is_names, "init_ia3_weights": _is_flag}),
        "PROMPT_TUNING": (
            peft.PromptTuningConfig,
            {
                "num_virtual_tokens": lambda value: is_int(value, 1, _MAX_PROMPT),
                "token_dim": lambda value: value == hidden_size,
                "num_transformer_submodules": lambda value: value == 1,
                "num_attention_heads": _is_count,
                "num_layers": _is_count,
            },
        ),
    }
    kind = settings.get("peft_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise AdapterError(f"adapters of PEFT's type {str(kind)[:40]!r} are not taken: use one of {', '.join(kinds)}")
    cls, options = kinds[kind]
    rules = common | options
    defaults = {field.name: _default(field) for field in dataclasses.fields(cls)}
    for key, value in settings.items():
        rule = rules.get(key)
        is_default = value == defaults[key] if key in defaults else not value  # a later PEFT's option, turned off
        if not (rule(value) if rule is not None else is_default):
            raise AdapterError(f"{PEFT_INFO} has {key[:60]} = {str(value)[:60]}, which is not taken: {_RETURN}")
    for key in rules.keys() - settings.keys():
        if not rules[key](defaults.get(key)):  # PEFT's own value may be out of range, as VeRA's rank of 256 is
            raise AdapterError(f"{PEFT_INFO} names no {key}: {_RETURN}")
    chosen = {key: settings[key] for key in options if settings.get(key) is not None and key != "rank_pattern"}
    try:
        return cls(task_type="CAUSAL_LM", **chosen)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise AdapterError(f"{PEFT_INFO} does not make sense ({reason[:200]}): {_RETURN}") from error


def is_int(value: Any, least: int, most: int) -> bool:
    """Whether it is an integer, and no boolean, in this range."""
    return type(value) is int and least <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_LARGEST < value < _LARGEST


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_count(value: Any) -> bool:
    return value is None or is_int(value, 0, 1 << 53)


def _is_commit(value: Any) -> bool:
    return value is None or (isinstance(value, str) and COMMIT.fullmatch(value) is not None)


def _is_text(value: Any) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= 256)


def _is_names(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MAX_NAMES
        and all(isinstance(name, str) and _MODULE.fullmatch(name) for name in value)
    )


def is_layers(value: Any, plan: SplitPlan) -> bool:
    """Whether it is a list of the edge's layers, each once, and not empty."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(layer) is int and layer in plan.edge_layers for layer in value)
        and len(set(value)) == len(value)
    )


def held(plan: SplitPlan) -> str:
    """What a message says about the edge's layers."""
    return f"the layers {', '.join(map(str, plan.edge_layers)) or '(none)'}"


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _is_targets(value: Any, layers: Any, plan: SplitPlan) -> bool:
    """Names in full, or short ones with the layers beside them: on the full model they must mean the same modules."""
    if isinstance(value, str):
        pattern = _LAYERS_AND_NAMES.fullmatch(value)
        if pattern is None:
            return False
        picked, names = pattern[1].split("|"), pattern[2].split("|")
        is_short = len(set(picked)) == len(picked) and len(names) <= _MAX_NAMES_IN_PATTERN
        return is_short and set(picked) <= set(map(str, plan.edge_layers))
    if not _is_names(value) or not value:
        return False
    return layers is not None or all(re.search(r"\.\d+\.", name) for name in value)
