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
        self._layers = getattr(self._base, self._list)
        self._below = nn.ModuleList(list(self._layers)[: plan.bottom + 1])  # to the remote layers
        if not with_top:
            self._layers = self._below
            setattr(self._base, self._list, self._below)
            # The layers that the model has been checked with keep those above the middle alive.
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

    def predict(self, ids: Tensor, middle: SpanFn, *, with_loss: bool = False) -> tuple[Tensor, Tensor | None]:
        """Run the tokens `[B, S]` with this middle, up to the head; for outer layers with a top.

        Returns:
            The logits `[B, S, V]`, and with `with_loss` the mean cross entropy.
        """
        labels = {"labels": ids} if with_loss else {}
        output = self._run(self._model, middle, input_ids=ids, **labels)
        return output.logits, output.loss if with_loss else None

    def _run(self, model: Any, middle: SpanFn, **inputs: Tensor) -> Any:
        self._remote_layers.span = middle
        try:
            return model(**inputs, use_cache=False)
        finally:
            self._remote_layers.span = _unchanged


def _unchanged(hidden: Tensor, _mask: Tensor | None, _positions: Tensor | None) -> Tensor:
    return hidden
