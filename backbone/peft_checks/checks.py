"""All checks together, for adapters that PEFT has put on a split model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from isthmus.backbone.peft_checks.allowed import check_config, check_layers, is_adalora
from isthmus.backbone.peft_checks.probe import check_sites
from isthmus.backbone.peft_checks.whole import check_against_whole

# Fields that PEFT itself sets in an adapter that is in place: when it saves, and when AdaLoRA moves its ranks.
_PEFTS_OWN = ("base_model_name_or_path", "revision", "inference_mode")
_PEFTS_OWN_ADALORA = (*_PEFTS_OWN, "rank_pattern")


def asked_of(config: Any) -> dict[str, Any]:
    """What a configuration of PEFT asks for, by field: all but what PEFT sets by itself."""
    own = _PEFTS_OWN_ADALORA if is_adalora(config) else _PEFTS_OWN
    return {"class": type(config), **{field: value for field, value in vars(config).items() if field not in own}}


def check_adapters(model: Any, stack: nn.ModuleList, configs: Mapping[str, Any], passed: Collection[str]) -> None:
    """Make sure that adapters compute what they would on the whole model.

    Args:
        model: The split language model.
        stack: Its decoder layers.
        configs: PEFT's configurations by adapter.
        passed: The adapters that need not be compared with the whole model again.

    Raises:
        UnsupportedCallError: One would not, or PEFT broke off while it wrapped the model.
    """
    for config in configs.values():
        check_config(config)
    layers = model.remote_layers.layers
    check_layers(layers, stack, configs)
    if not configs:
        return
    model.remote_layers.check_span()
    for adapter, config in configs.items():
        if adapter not in passed:
            check_against_whole(model, adapter, config)
    check_sites(layers)
