"""What the attacker of a leak budget knows: everything but the texts, the labels, and the key that noise is drawn from.

It knows the edge's adapters too, as whoever gets the adapter later can attack a recording of today. So a front that is
tuned in secret protects nothing here. Where labels stand it knows as well: the form of the data says so.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.backbone.families import family_of
from isthmus.backbone.split.edge_model import SpanFn
from isthmus.backbone.split.span import LayerStandIn, sharing_copy
from isthmus.edge.data.batches import Encoded
from isthmus.edge.training.defended_run import DefendedRun
from isthmus.privacy.attacks.attack import Knowledge, KnownDefence
from isthmus.privacy.attacks.front import Front
from isthmus.privacy.attacks.known_defences import KnownDefences

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def knowledge_of(
    model: Any,
    tokenizer: Any,
    defended: DefendedRun | None,
    public: Sequence[Encoded],
    codec: str,
    span: SpanFn | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> Knowledge:
    """The attacker's knowledge of a run as it is now.

    Args:
        model: The edge's model, without PEFT's wrapper.
        public: Texts that it learns from.
        codec: Of what it attacks.
        span: The cloud's layers; None where no attack needs them.
        check_stop: Called before each of the attacker's forwards; what it raises ends the attack.

    Raises:
        ConfigError: One of the defences cannot be known, such as a secret rotation.
    """
    seen = _without_hooks(model)
    seen.get_submodule(family_of(model.config).base).register_forward_pre_hook(lambda *_: check_stop())
    front = Front(seen, model.split_plan.bottom)
    tokens = tuple(torch.tensor(text.input_ids) for text in public)
    known: KnownDefence | None = None
    if defended is not None and defended.defences:
        defences = copy.deepcopy(defended.defences)
        for module in filter(None, (each.module() for each in defences)):
            module.requires_grad_(False)
        known = KnownDefences(defences, lambda: [front.states(text) for text in tokens])
    if span is not None:
        family = family_of(model.config)
        base = seen.get_submodule(family.base)
        layers = list(getattr(base, family.layers))
        first = model.split_plan.cloud.start
        layers[first] = _CloudLayers(layers[first], span)
        setattr(base, family.layers, nn.ModuleList(layers))
    return Knowledge(seen, tokenizer, model.split_plan, front, tokens, codec=codec, defence=known, label_places=True)


class _CloudLayers(LayerStandIn):
    """In the place of the cloud's layers: sends what comes to it through them, which the attacker has defended."""

    def __init__(self, layer: nn.Module, span: SpanFn) -> None:
        super().__init__(layer)
        self._does = (span,)  # in a tuple, so that a span which is a module becomes no submodule

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        with torch.no_grad():
            return self._does[0](hidden_states, None, None)


def _without_hooks(model: Any) -> Any:
    """A copy that shares the weights, without what cuts the edge's forward off and defends it."""
    copied = sharing_copy(model).eval()
    family = family_of(model.config)
    base = copied.get_submodule(family.base)
    for module in (base, getattr(base, family.embedding)):
        for name in _HOOKS:
            setattr(module, name, OrderedDict())
    return copied
