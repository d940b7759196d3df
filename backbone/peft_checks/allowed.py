"""Which PEFT methods may sit on a linear that the cloud holds, and what else PEFT may do to the cloud's layers.

On the edge such a linear is a skeleton that gives zeros, so a method is right there exactly if it adds a function of
the linear's *input* to its output. A method that scales or rotates the output (IA³, OFT, BOFT), or reads the weight
(DoRA, PiSSA, OLoRA, HRA), would be silently wrong, or does not even start. So this is a list of what is allowed, and
every entry has a test of its gradients at such a site.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from isthmus.backbone.sites.edge_sites import adapters_of, is_peft_layer
from isthmus.backbone.skeleton import ALLOWED, SkeletonConv1D, SkeletonLayer, SkeletonLinear
from isthmus.common.errors import UnsupportedCallError

# Module of PEFT -> names of its layer classes.
_LAYERS = {
    "peft.tuners.lora.layer": {"Linear"},
    "peft.tuners.adalora.layer": {"SVDLinear"},
    "peft.tuners.vera.layer": {"Linear"},
    "peft.tuners.loha.layer": {"Linear"},
    "peft.tuners.lokr.layer": {"Linear"},
}

# Ways to initialise LoRA that look at neither weights nor data.
_INITS = (True, False, "gaussian")

_SPOKEN = {"LORA": "LoRA", "ADALORA": "AdaLoRA", "VERA": "VeRA", "LOHA": "LoHa", "LOKR": "LoKr", "IA3": "IA³"}


def check_config(config: Any) -> None:
    """Make sure that an adapter's configuration asks for nothing that no split model can do.

    Args:
        config: A configuration of PEFT.

    Raises:
        UnsupportedCallError: It does.
    """
    replication = getattr(config, "layer_replication", None)
    if replication:
        raise UnsupportedCallError(
            f"layer_replication={replication} repeats layers, and the cloud runs each of its own once: leave it out"
        )
    if peft_type(config) == "XLORA":
        raise UnsupportedCallError(
            "X-LoRA weighs its adapters by the hidden states of all layers, and the cloud's are not here: use one LoRA"
        )


def check_layers(layers: Iterable[SkeletonLayer], stack: nn.ModuleList, configs: Mapping[str, Any]) -> None:
    """Make sure that what PEFT has put on the cloud's layers works there.

    Args:
        layers: What stands for the cloud's layers in the edge's model.
        stack: All decoder layers of the model.
        configs: PEFT's configurations by adapter.

    Raises:
        UnsupportedCallError: A method would be silently wrong, or something else than a linear is wrapped.
    """
    for layer in layers:
        # A model may be cut behind its cloud layers. Whatever else wraps a whole layer has no weights to train.
        if layer.index < len(stack) and type(stack[layer.index]).__module__.startswith("peft."):
            _refuse_whole(layer.name)
        wrapped: list[str] = []
        for part, module in layer.named_modules():
            name = f"{layer.name}.{part}".rstrip(".")
            if is_peft_layer(module):
                wrapped.append(f"{part}.")
                for adapter in adapters_of(module):
                    if adapter not in configs:
                        raise UnsupportedCallError(
                            f"{name} carries the adapter {adapter!r}, with which PEFT has not finished: load the model "
                            "anew and wrap it again"
                        )
                    check_method(name, module, configs[adapter])
            elif type(module).__module__.startswith("peft.") and not part.startswith(tuple(wrapped)):
                _refuse_whole(name)


def check_method(name: str, module: nn.Module, config: Any) -> None:
    """Make sure that a PEFT layer over a skeleton computes what it would over the real linear.

    Args:
        name: The site's name in the whole model.
        module: The PEFT layer.
        config: The configuration of its adapter.

    Raises:
        UnsupportedCallError: It would not.
    """
    method = _spoken(config)
    kind = type(module)
    if kind.__name__ not in _LAYERS.get(kind.__module__, ()):
        _refuse(name, method, f"use one that works on its input alone ({ALLOWED})")
    if not isinstance(module.base_layer, SkeletonLinear | SkeletonConv1D):
        _refuse(name, method, "put one adapter on a layer, not one over another")
    if "forward" in vars(module):  # X-LoRA puts its own in the place of LoRA's
        _refuse(name, f"{method} with another forward", "use PEFT's own")
    variants: Any = getattr(module, "lora_variant", None)
    if variants:  # DoRA, aLoRA and others that change LoRA's own formula
        kinds = ", ".join(sorted({type(variant).__name__ for variant in variants.values()}))
        _refuse(name, f"{method} with {kinds}", "use plain LoRA or rsLoRA there")
    bias = getattr(config, "bias", "none")
    if bias not in (None, False, "none"):  # it would train the edge's biases and leave out the cloud's
        _refuse(name, f"{method} with bias={bias!r}", "use bias='none'")
    init = getattr(config, "init_lora_weights", True)
    if init not in _INITS:
        _refuse(name, f"{method} with init_lora_weights={init!r}", "use init_lora_weights=True or 'gaussian'")


def is_adalora(config: Any) -> bool:
    """Whether a configuration is AdaLoRA's, which gives its parameters other shapes while it trains or loads."""
    return peft_type(config) == "ADALORA"


def _refuse_whole(name: str) -> None:
    raise UnsupportedCallError(
        f"{name} is in the cloud and cannot be trained as a whole: name modules of the edge's own layers in "
        "modules_to_save"
    )


def _refuse(name: str, method: str, remedy: str) -> None:
    raise UnsupportedCallError(
        f"{method} on {name}, which the cloud holds, would not compute what it does on the whole model: {remedy}, or "
        "keep it to the edge's own layers (layers_to_transform)"
    )


def _spoken(config: Any) -> str:
    if getattr(config, "use_dora", False):
        return "DoRA"
    return _SPOKEN.get(peft_type(config), peft_type(config))


def peft_type(config: Any) -> str:
    """PEFT's name of a method, such as "LORA"."""
    return str(getattr(config.peft_type, "value", config.peft_type))
