"""The frozen layers on both sides of the middle, as the model's owner runs them around one middle or another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_model import SpanFn
from isthmus.backbone.split.edge_parts import load_edge_parts


class OuterLayers:
    """Embedding, bottom layers and, `with_top`, top layers, norm and head; frozen, in eval mode, fp32."""

    def __init__(
        self, checkpoint: Checkpoint, plan: SplitPlan, *, with_top: bool, device: torch.device | str = "cpu"
    ) -> None:
        model = load_edge_parts(checkpoint, plan, _unchanged)
        model.requires_grad_(False)
        family = model.isthmus_origin.family
        self._remote_layers = model.remote_layers
        self._base: Any = model.get_submodule(family.base)
        self._list = family.layers
        layers = list(getattr(self._base, self._list))
        self._below = nn.ModuleList(layers[: plan.bottom + 1])  # to the remote layers
        # What the remote layers give does not depend on their input, so they stand in for the layers below them.
        self._above = nn.ModuleList([self._remote_layers] * plan.bottom + layers[plan.bottom :])
        if not with_top:
            self._above = self._below
            # The layers that the model has been checked with keep those above the middle alive.
            setattr(self._base, self._list, self._below)
            model.note_unwrapped()
        self._model: Any = model.to(device) if with_top else None
        self._base.to(device)

    @torch.no_grad()
    def entry(self, ids: Tensor) -> Tensor:
        """Hidden states at the middle's entry, `[B, S, h]`, of tokens `[B, S]` without padding."""
        seen: list[Tensor] = []

        def record(hidden: Tensor, _mask: Tensor | None, _positions: Tensor | None) -> Tensor:
            seen.append(hidden)
            return hidden

        self._run(self._base, self._below, record, input_ids=ids)
        return seen[0]

    def predict(self, ids: Tensor, states: Tensor, *, with_loss: bool = False) -> tuple[Tensor, Tensor | None]:
        """Run what is above the middle, for outer layers with a top.

        Args:
            ids: Tokens `[B, S]`.
            states: Hidden states after the middle, `[B, S, h]`.

        Returns:
            The logits `[B, S, V]`, and with `with_loss` the mean cross entropy.
        """
        labels = {"labels": ids} if with_loss else {}
        output = self._run(
            self._model, self._above, lambda hidden, _mask, _positions: states.to(hidden.dtype), input_ids=ids, **labels
        )
        return output.logits, output.loss if with_loss else None

    def _run(self, model: Any, layers: nn.ModuleList, middle: SpanFn, **inputs: Tensor) -> Any:
        before = getattr(self._base, self._list)
        setattr(self._base, self._list, layers)
        self._remote_layers.span = middle
        try:
            return model(**inputs, use_cache=False)
        finally:
            self._remote_layers.span = _unchanged
            setattr(self._base, self._list, before)


def _unchanged(hidden: Tensor, _mask: Tensor | None, _positions: Tensor | None) -> Tensor:
    return hidden
