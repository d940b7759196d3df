"""The cloud's part: a frozen run of decoder layers as one module."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from isthmus.backbone.assembly import build_on_meta, check_materialised, load_parameters, rebuild_buffers
from isthmus.backbone.checkpoint import TensorReader
from isthmus.backbone.errors import PlanError
from isthmus.backbone.families import Family, family_of
from isthmus.backbone.plan import Span, SplitPlan
from isthmus.backbone.sources import Checkpoint


class FrozenSpan(nn.Module):
    """Decoder layers `[start, stop)` of a model: hidden states in, hidden states out.

    The work is done by transformers' own base model with its list of layers cut, so masks, windows and rotary
    embeddings are those of the whole model. Always in eval mode (dropout never acts, `train()` changes nothing) and
    without trainable parameters; gradients flow to the input. Built by `load_span`.

    Attributes:
        layer_span: The layers, by their indices in the whole model.
        config: Configuration of the whole model.
        hidden_size: Width `h` of the hidden states.
        n_params: Number of weights held.
    """

    def __init__(self, base: nn.Module, layer_span: Span, config: Any, hidden_size: int) -> None:
        super().__init__()
        self.base = base
        self.layer_span = layer_span
        self.config = config
        self.hidden_size = hidden_size
        self.requires_grad_(False)
        self.train(False)

    @property
    def dtype(self) -> torch.dtype:
        """Floating point dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def n_params(self) -> int:
        """Number of weights held."""
        return sum(parameter.numel() for parameter in self.parameters())

    def train(self, _mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Run the layers.

        Args:
            hidden: Hidden states before the first layer, `[B, S, h]`, in the span's dtype.
            attention_mask: `[B, S]`, 1 for tokens and 0 for padding, as the caller of the whole model gave it; None
                for no padding.
            position_ids: `[B, S]` or `[1, S]`, or None for what the whole model does without (count from 0; OPT
                counts tokens).

        Returns:
            Hidden states after the last layer, `[B, S, h]`.
        """
        output = self.base(
            inputs_embeds=hidden, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )
        result: Tensor = output.last_hidden_state
        return result


class _NoPositions(nn.Module):
    """In the place of a learned position embedding, which the edge has added: a zero that costs next to nothing."""

    def forward(self, *_args: Any, **_kwargs: Any) -> Tensor:
        return torch.zeros(())  # 0-dimensional, so it takes the dtype of what it is added to


def load_span(
    source: Checkpoint | Path,
    span: Span | SplitPlan,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> FrozenSpan:
    """Load a run of layers from a checkpoint; no other tensor is read.

    Args:
        source: The whole model's checkpoint, or its folder.
        span: The layers, or a plan, whose cloud layers are meant.
        dtype: Floating point dtype of the weights.
        attn_implementation: Attention implementation; None for the family's default. Both sides must use the same.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete, or does not fit its configuration.
        ConfigError: the attention implementation does not fit the family.
        PlanError: the model has no such layers.
        UnsupportedFamilyError: the architecture cannot be cut.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source, source.name)
    config = checkpoint.config
    family = family_of(config)
    layer_span = _layers_of(span, config.num_hidden_layers)
    model = build_on_meta(config, family, dtype, attn_implementation)
    base = _cut(model.get_submodule(family.base), family, layer_span)

    reader = TensorReader(checkpoint.folder, prefix=model.base_model_prefix + ".")
    for index, layer in zip(layer_span, getattr(base, family.layers), strict=True):
        load_parameters(layer, f"{family.layers_path}.{index}.", reader)
    rebuild_buffers(base)
    check_materialised(base)
    return FrozenSpan(base, layer_span, config, config.hidden_size)


def _layers_of(span: Span | SplitPlan, n_layers: int) -> Span:
    if isinstance(span, SplitPlan):
        if span.n_layers != n_layers:
            raise PlanError(
                f"split plan {span} is for {span.n_layers} layers, but the model has {n_layers}; parse it again"
            )
        return span.cloud
    if not len(span) or span.stop > n_layers:
        raise PlanError(
            f"the model has {n_layers} layers, so there is no span {span}; choose layers within 0:{n_layers}"
        )
    return span


def _cut(base: Any, family: Family, span: Span) -> Any:
    """Take everything but the layers out of a base model, which keeps looping over what is left."""
    # Existing layers are cut: layers built from a shortened configuration would take their index for their depth.
    setattr(base, family.layers, nn.ModuleList(list(getattr(base, family.layers))[span.start : span.stop]))
    base.config = copy.deepcopy(base.config)  # the layers and the rotary embedding keep the whole model's
    base.config.num_hidden_layers = len(span)
    if getattr(base.config, "layer_types", None) is not None:
        base.config.layer_types = list(base.config.layer_types)[span.start : span.stop]
    setattr(base, family.embedding, None)
    if getattr(base, family.norm) is not None:
        setattr(base, family.norm, nn.Identity())
    if family.positions is not None:
        setattr(base, family.positions, _NoPositions())
    for name in family.projections:
        setattr(base, name, None)
    return base
