"""Which PEFT methods may sit on a linear that the cloud holds.

On the edge such a linear is a skeleton that gives zeros, so a method is right there exactly if it adds a function of
the linear's *input* to its output. A method that scales or rotates the output (IA³, OFT, BOFT), or reads the weight
(DoRA, PiSSA, OLoRA, HRA), would be silently wrong, or does not even start. So this is a list of what is allowed, and
every entry has a test of its gradients at such a site.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from isthmus.backbone.errors import UnsupportedCallError
from isthmus.backbone.skeleton import ALLOWED, SkeletonConv1D, SkeletonLinear

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

_SPOKEN = {"LORA": "LoRA", "ADALORA": "AdaLoRA", "VERA": "VeRA", "LOHA": "LoHa", "LOKR": "LoKr"}


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
    if not isinstance(module.get_base_layer(), SkeletonLinear | SkeletonConv1D):  # type: ignore[operator]  # PEFT's
        _refuse(name, method, "put one adapter on a layer, not one over another")
    if getattr(module, "lora_variant", None):  # DoRA, aLoRA and others that change LoRA's own formula
        _refuse(name, method, "use plain LoRA or rsLoRA there")
    bias = getattr(config, "bias", "none")
    if bias not in (None, False, "none"):  # it would train the edge's biases and leave out the cloud's
        _refuse(name, f"{method} with bias={bias!r}", "use bias='none'")
    init = getattr(config, "init_lora_weights", True)
    if init not in _INITS:
        _refuse(name, f"{method} with init_lora_weights={init!r}", "use init_lora_weights=True or 'gaussian'")


def _refuse(name: str, method: str, remedy: str) -> None:
    raise UnsupportedCallError(
        f"{method} on {name}, which the cloud holds, would not compute what it does on the whole model: {remedy}, or "
        "keep it to the edge's own layers (layers_to_transform)"
    )


def _spoken(config: Any) -> str:
    if getattr(config, "use_dora", False):
        return "DoRA"
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    return _SPOKEN.get(kind, kind)
