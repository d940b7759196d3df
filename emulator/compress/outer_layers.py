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
    """Embedding, bottom layers and, if wanted, top layers, norm and head; frozen, in eval mode.

    Args:
        checkpoint: The model, or an edge's parts.
        plan: Where the middle is.
        with_top: Whether there is a loss to compute. Without it nothing above the middle is kept.
        dtype: Floating point dtype of the weights.
        attn_implementation: Attention implementation; None for the family's default.
        device: Where the weights lie.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: SplitPlan,
        *,
        with_top: bool,
        dtype: torch.dtype = torch.float32,
        attn_implementation: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        model = load_edge_parts(checkpoint, plan, _unchanged, dtype=dtype, attn_implementation=attn_implementation)
        model.requires_grad_(False)
        family = model.isthmus_origin.family
        self._gate = model.remote_layers
        self._base: Any = model.get_submodule(family.base)
        self._list = family.layers
        self._layers = getattr(self._base, self._list)
        self._below = nn.ModuleList(list(self._layers)[: plan.bottom + 1])  # to the gate
        if not with_top:
            self._layers = self._below
            setattr(self._base, self._list, self._below)
        self._model: Any = model.to(device) if with_top else None
        self._base.to(device)

    @torch.no_grad()
    def entry(self, ids: Tensor) -> Tensor:
        """Hidden states at the middle's entry, `[B, S, h]`, of tokens `[B, S]` without padding."""
        seen: list[Tensor] = []

        def record(hidden: Tensor, _mask: Tensor | None, _positions: Tensor | None) -> Tensor:
            seen.append(hidden)
            return hidden

        setattr(self._base, self._list, self._below)
        try:
            self._run(self._base, record, input_ids=ids)
        finally:
            setattr(self._base, self._list, self._layers)
        return seen[0]

    def loss(self, ids: Tensor, middle: SpanFn) -> Tensor | None:
        """Run the tokens `[B, S]` with this middle; returns their mean cross entropy, or None without a top."""
        if self._model is None:
            self._run(self._base, middle, input_ids=ids)
            return None
        loss: Tensor = self._run(self._model, middle, input_ids=ids, labels=ids).loss
        return loss

    def _run(self, model: Any, middle: SpanFn, **inputs: Tensor) -> Any:
        self._gate.span = middle
        try:
            return model(**inputs, use_cache=False)
        finally:
            self._gate.span = _unchanged


def _unchanged(hidden: Tensor, _mask: Tensor | None, _positions: Tensor | None) -> Tensor:
    return hidden
