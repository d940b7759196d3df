"""The edge's top of a model as the cloud believes it to be: what it makes of the span's output, and its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from isthmus.backbone.families import family_of
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.span import LayerStandIn, arrange_layers, sharing_copy


class ModelTop:
    """The layers above the span, then what leads to the logits: final norm, and OPT's projection.

    Attributes:
        head: The rows of the head, `[V, width]`, in fp64.

    Args:
        model: A whole transformers causal LM, which stays as it is.
        plan: Where it is cut.
    """

    def __init__(self, model: Any, plan: SplitPlan) -> None:
        family = family_of(model.config)
        plan.check_layers(model.config.num_hidden_layers)
        base = sharing_copy(model.get_submodule(family.base))
        layers = list(getattr(base, family.layers))
        last = plan.cloud.stop - 1
        kept = range(plan.cloud.stop, plan.n_layers)
        tail = (family.norm, *family.projections[1:])
        self._given = _Given(layers[last])
        self._tail = [part for name in tail if (part := getattr(base, name)) is not None]
        if getattr(base, family.norm) is not None:
            setattr(base, family.norm, nn.Identity())
        for name in family.projections[1:]:
            setattr(base, name, None)
        arrange_layers(base, [self._given, *(layers[index] for index in kept)], [last, *kept], model.config)
        self._base: Any = base.eval()
        self.head: Tensor = model.get_output_embeddings().weight.detach().double()
        self._cap: float | None = getattr(model.config, "final_logit_softcapping", None)

    def through(self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        """Run the layers above the span.

        Args:
            hidden: The span's output, `[1, S, h]`.
            mask: `[1, S]`, or None.
            positions: `[1, S]`, or None.

        Returns:
            What comes out of the last layer, `[1, S, h]`.
        """
        self._given.states = hidden
        # The base model embeds these tokens, and the stand-in for the span puts the states in their place.
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long)
        output = self._base(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        states: Tensor = output.last_hidden_state
        return states

    def tail(self, states: Tensor) -> Tensor:
        """What the head reads, `[..., width]`, of what comes out of the last layer, `[..., h]`."""
        for module in self._tail:
            states = module(states)
        return states

    def logit_slopes(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The model's logits of the head's products `[..., V]`, and their derivative; Gemma 2 caps them."""
        if self._cap is None:
            return logits, torch.ones_like(logits)
        bent = torch.tanh(logits / self._cap)
        return bent * self._cap, 1 - bent.square()


class _Given(LayerStandIn):
    """In the place of the span: gives the states that it was given, whatever comes in."""

    states: Tensor

    def forward(self, _hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return self.states

