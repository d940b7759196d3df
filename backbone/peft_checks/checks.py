"""When the checks run: once for each adapter that PEFT has put on a split model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from isthmus.backbone.peft_checks.allowed import check_config, check_layers, is_adalora
from isthmus.backbone.peft_checks.probe import check_sites
from isthmus.backbone.peft_checks.whole import check_against_whole

# Fields that PEFT itself sets in an adapter that is in place: when it saves, and when AdaLoRA moves its ranks.
_PEFTS_OWN = ("base_model_name_or_path", "revision", "inference_mode")
_PEFTS_OWN_ADALORA = (*_PEFTS_OWN, "rank_pattern")


class PeftChecks:
    """Remembers which adapters of a split model have passed."""

    def __init__(self) -> None:
        # By adapter, and by value: a configuration can be changed and used again.
        self._passed: dict[str, dict[str, Any]] = {}

    def check(self, model: Any, configs: Mapping[str, Any]) -> None:
        """Make sure that the adapters compute what they would on the whole model.

        An adapter that has passed with the same configuration is not looked at again.

        Args:
            model: The split language model.
            configs: PEFT's configurations by adapter.

        Raises:
            UnsupportedCallError: One would not, or PEFT broke off while it wrapped the model.
        """
        asked = {adapter: _asked(config) for adapter, config in configs.items()}
        if configs and asked == self._passed:
            return
        for config in configs.values():
            check_config(config)
        origin, base = model.isthmus_origin, model.layered_model
        layers = getattr(base, origin.family.layers)
        cloud = [
            index for index in origin.plan.cloud if index < len(layers)
        ]  # a model may be cut behind its cloud layers
        check_layers(layers, origin.family.layers_path, cloud, configs)
        if configs:
            model.remote_layers.check_span(base)
            for adapter, config in configs.items():
                if asked[adapter] != self._passed.get(adapter):
                    check_against_whole(model, adapter, config)
            check_sites(layers, origin.family.layers_path, cloud)
        self._passed = copy.deepcopy(asked)


def _asked(config: Any) -> dict[str, Any]:
    """What a configuration asks for, without what PEFT sets by itself."""
    own = _PEFTS_OWN_ADALORA if is_adalora(config) else _PEFTS_OWN
    return {"class": type(config), **{field: value for field, value in vars(config).items() if field not in own}}
