"""When the checks run: once for each adapter that PEFT has put on a split model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isthmus.backbone.peft_checks.allowed import check_config, check_layers
from isthmus.backbone.peft_checks.probe import check_sites
from isthmus.backbone.peft_checks.whole import check_against_whole


class PeftChecks:
    """Remembers which adapters of a split model have passed."""

    def __init__(self) -> None:
        self._passed: dict[str, Any] = {}  # configurations of PEFT by adapter

    def check(self, model: Any, configs: Mapping[str, Any]) -> None:
        """Make sure that the adapters compute what they would on the whole model.

        An adapter that has passed with the same configuration is not looked at again.

        Args:
            model: The split language model.
            configs: PEFT's configurations by adapter.

        Raises:
            UnsupportedCallError: One would not, or PEFT broke off while it wrapped the model.
        """
        known = configs.keys() == self._passed.keys()
        if configs and known and all(configs[name] is self._passed[name] for name in configs):
            return
        for config in configs.values():
            check_config(config)
        origin, base = model.isthmus_origin, model.layered_model
        layers = getattr(base, origin.family.layers)
        cloud = [index for index in origin.plan.cloud if index < len(layers)]  # a model may be cut behind the gate
        check_layers(layers, origin.family.layers_path, cloud, configs)
        if configs:
            model.span_gate.check_span(base)
            for adapter, config in configs.items():
                if config is not self._passed.get(adapter):
                    check_against_whole(model, adapter, config)
            check_sites(layers, origin.family.layers_path, cloud)
        self._passed = dict(configs)
