"""Decoder layers of a model as one module: the cloud's part, a frozen run of them, or any choice in any number."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from isthmus.backbone.checkpoints.assembly import build_on_meta, check_materialised, load_parameters, rebuild_buffers
from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.checkpoints.span_format import DTYPE_NAMES
from isthmus.backbone.checkpoints.tensor_reader import TensorReader
from isthmus.backbone.checkpoints.weight_quantization import QuantizedLinear, Quantizer, quantize_linears
from isthmus.backbone.families import Family, family_of, longest_sequence
from isthmus.backbone.plan import Span, SplitPlan
from isthmus.common.errors import ConfigError, PlanError

DTYPES = dict(zip(DTYPE_NAMES, (torch.float32, torch.bfloat16), strict=True))
"""What a span computes in, by the names that options have."""
LOWEST_POSITION = -1
"""What `attention_mask.cumsum(-1) - 1` numbers padding on the left with."""


def check_length(longest: int, length: int) -> None:
    """Check that a model is made for sequences of this length.

    Args:
        longest: Token positions of a sequence at most, see `isthmus.backbone.families.longest_sequence`.
        length: Token positions of a sequence.

    Raises:
        ConfigError: It is not.
    """
    if length > longest:
        raise ConfigError(
            f"a sequence of {length} tokens is longer than the {longest} that the model is made for: cut it into "
            "shorter ones"
        )


def check_position_ids(longest: int, position_ids: Tensor | None) -> None:
    """Check that a model is made for these position ids: whole numbers, or None where they are counted.

    Raises:
        ConfigError: It is not.
    """
    if position_ids is None or not position_ids.numel():
        return
    lowest, highest = int(position_ids.min()), int(position_ids.max())
    if lowest < LOWEST_POSITION or highest >= longest:
        raise ConfigError(
            f"position ids from {lowest} to {highest} do not fit the model, which knows 0 to {longest - 1} "
            f"({LOWEST_POSITION} for padding): count each sequence's tokens from 0"
        )


@dataclass(frozen=True, slots=True)
class SpanInput:
    """What a span is a function of.

    Shape: hidden [batch, sequence, hidden size]; attention_mask [batch, sequence] or None; position_ids [batch or 1,
    sequence] or None.
    """

    hidden: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None

    @property
    def positions(self) -> int:
        """Token positions."""
        return self.hidden.shape[0] * self.hidden.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors together."""
        tensors = (self.hidden, self.attention_mask, self.position_ids)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class FrozenSpan(nn.Module):
    """Decoder layers `[start, stop)` of a model: hidden states in, hidden states out.

    The work is done by transformers' own base model with its list of layers cut, so masks, windows and rotary
    embeddings are those of the whole model. Always in eval mode (dropout never acts, `train()` changes nothing) and
    without trainable parameters; gradients flow to the input. Built by `load_span`.

    Attributes:
        layer_span: The layers, by their indices in the whole model.
        config: Configuration of the whole model.
        hidden_size: Width `h` of the hidden states.
        dtype: Floating point dtype that it computes in, and that its weights have unless they are quantized.
        longest: Token positions of a sequence that the model is made for.
    """

    def __init__(self, base: nn.Module, layer_span: Span, config: Any, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        self.layer_span = layer_span
        self.config = config
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.longest = longest_sequence(config)
        self.requires_grad_(False)
        self.train(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in running order."""
        layers: nn.ModuleList = getattr(self.base, family_of(self.config).layers)
        return layers

    @property
    def n_params(self) -> int:
        """Number of weights held; a quantized one counts as one."""
        packed = (m.in_features * m.out_features for m in self.modules() if isinstance(m, QuantizedLinear))
        return sum(parameter.numel() for parameter in self.parameters()) + sum(packed)

    def train(self, _mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    def with_layers(self, layers: Sequence[nn.Module]) -> FrozenSpan:
        """A span with other modules in the place of the layers; it shares everything else with this one."""
        base = copy.copy(self.base)
        base._modules = {**self.base._modules, family_of(self.config).layers: nn.ModuleList(layers)}
        return FrozenSpan(base, self.layer_span, self.config, self.hidden_size, self.dtype)

    def part(self, layers: Span) -> FrozenSpan:
        """A run of the layers, which it shares with this one. Raises PlanError where they are not all here."""
        if not layers or not self.layer_span.covers(layers):
            raise PlanError(f"the layers {layers} are not all among {self.layer_span}: choose some of these")
        base = copy.copy(self.base)
        base._modules = dict(self.base._modules)
        first = self.layer_span.start
        arrange_layers(base, list(self.layers[layers.start - first : layers.stop - first]), tuple(layers), self.config)
        return FrozenSpan(base, layers, self.config, self.hidden_size, self.dtype)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Run the layers.

        Args:
            hidden: Hidden states before the first layer, `[B, S, h]`, in the span's dtype.
            attention_mask: `[B, S]`, 1 for tokens and 0 for padding, as the caller of the whole model gave it; None
                for no padding. With a cache, `[B, P + S]`.
            position_ids: `[B, S]` or `[1, S]`, or None for what the whole model does without (count from 0; OPT
                counts tokens).
            cache: Keys and values of the `P` positions before, which gets those of these positions; None for none. See
                `isthmus.backbone.decoding.key_values`.

        Returns:
            Hidden states after the last layer, `[B, S, h]`.
        """
        return run_layers(self.base, hidden, attention_mask, position_ids, cache)


class LayerStandIn(nn.Module):
    """Stands for a decoder layer in a base model, which may ask it for the layer's attributes.

    Args:
        layer: The layer, which is no submodule of this one.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._stands_for = (layer,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._stands_for[0], name)


def sharing_copy(module: nn.Module) -> Any:
    """A copy of a module and of all modules in it, which share tensors, attributes and hooks with the originals.

    So submodules and attributes of the copy may be replaced, and the original stays as it is.
    """
    copied = copy.copy(module)
    copied._modules = {name: None if child is None else sharing_copy(child) for name, child in module._modules.items()}
    return copied


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
    quantizer: Quantizer | None = None,
) -> FrozenSpan:
    """Load a run of layers from a checkpoint; no other tensor is read.

    Args:
        source: The whole model's checkpoint, or its folder.
        span: The layers, or a plan, whose cloud layers are meant.
        dtype: Floating point dtype of the weights.
        attn_implementation: Attention implementation; None for the family's default. Both sides must use the same.
        quantizer: Quantizes each layer's linears before the next layer is read, so that at no time more than one layer
            is there in full precision; None leaves them as they are.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete, or does not fit its configuration.
        ConfigError: the attention implementation does not fit the family.
        PlanError: the model has no such layers.
        UnsupportedFamilyError: the architecture cannot be cut.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source, source.name)
    config = checkpoint.config
    family_of(config)
    layer_span = _layers_of(span, config.num_hidden_layers)
    base = load_layers(
        checkpoint, tuple(layer_span), dtype=dtype, attn_implementation=attn_implementation, quantizer=quantizer
    )
    return FrozenSpan(base, layer_span, config, config.hidden_size, dtype)


def load_layers(
    source: Checkpoint | Path,
    layers: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    quantizer: Quantizer | None = None,
) -> nn.Module:
    """transformers' base model with these layers of a checkpoint and nothing else; `run_layers` runs it.

    Args:
        source: The whole model's checkpoint, or its folder. Only the layers' tensors are read, each once.
        layers: Indices in the whole model, in running order. One that stands several times is one module that runs
            several times.
        dtype: Floating point dtype of the weights.
        attn_implementation: Attention implementation; None for the family's default.
        quantizer: As for `load_span`.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete, or does not fit its configuration.
        ConfigError: the attention implementation does not fit the family.
        PlanError: there are no layers, or the model has no such layer.
        UnsupportedFamilyError: the architecture cannot be cut.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source, source.name)
    config = checkpoint.config
    family = family_of(config)
    base: nn.Module = empty_layers(config, layers, dtype=dtype, attn_implementation=attn_implementation)
    reader = TensorReader(checkpoint.folder, prefix=f"{base.base_model_prefix}.")
    for index, layer in distinct_layers(base, layers).items():
        load_parameters(layer, f"{family.layers_path}.{index}.", reader)
        if quantizer is not None:
            quantize_linears(layer, quantizer)
    check_materialised(base)
    return base


def empty_layers(config: Any, layers: Sequence[int], *, dtype: torch.dtype, attn_implementation: str | None) -> Any:
    """What `load_layers` returns, before any weight is read: the layers lie on the meta device.

    Args:
        config: Configuration of the whole model.
        layers: Indices in the whole model, in running order.
        dtype: Floating point dtype of the weights.
        attn_implementation: Attention implementation; None for the family's default.

    Raises:
        ConfigError: the attention implementation does not fit the family.
        PlanError: there are no layers or too many, or the model has no such layer.
        UnsupportedFamilyError: the architecture cannot be cut.
    """
    family = family_of(config)
    wrong = [layer for layer in layers if not 0 <= layer < config.num_hidden_layers]
    if wrong or not layers:
        raise PlanError(
            f"the model has {config.num_hidden_layers} layers, so there is no choice of layers "
            f"{', '.join(map(str, wrong)) or '(none)'}; choose among 0 to {config.num_hidden_layers - 1}"
        )
    model = build_on_meta(config, family, dtype, attn_implementation)
    base = model.get_submodule(family.base)
    everything = list(getattr(base, family.layers))
    arrange_layers(base, [everything[layer] for layer in layers], layers, config)
    _strip(base, family)
    rebuild_buffers(base)
    return base


def arrange_layers(base: Any, modules: Sequence[nn.Module], layers: Sequence[int], config: Any) -> None:
    """Let a base model loop over `modules`, which are the whole model's layers number `layers`, in place.

    Args:
        base: The base model.
        modules: Decoder layers in running order, no more than the model has; one may stand several times.
        layers: Their indices in the whole model.
        config: Configuration of the whole model.

    Raises:
        PlanError: There are more layers than the model has, and its base model would leave out the last ones.
    """
    family = family_of(config)
    if len(modules) > config.num_hidden_layers:
        raise PlanError(f"{len(modules)} layers are more than the {config.num_hidden_layers} that the model has")
    # Existing layers are arranged: layers built from a shortened configuration would take their index for their depth.
    setattr(base, family.layers, nn.ModuleList(modules))
    types = getattr(config, "layer_types", None)
    if types is not None:
        # The base models of Qwen and Gemma choose a layer's mask by its place in the loop, before the layer is called.
        # The layers themselves and the rotary embedding keep the whole model's configuration.
        base.config = copy.deepcopy(base.config)
        base.config.layer_types = [types[layer] for layer in layers]


def distinct_layers(base: nn.Module, layers: Sequence[int]) -> dict[int, nn.Module]:
    """The decoder layers of a base model by their indices in the whole model, each once.

    Args:
        base: What `load_layers` or `empty_layers` returned.
        layers: The running order that it was made with.
    """
    config: Any = base.config
    return dict(zip(layers, getattr(base, family_of(config).layers), strict=True))


def run_layers(
    base: nn.Module,
    hidden: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Any = None,
) -> Tensor:
    """Run a base model that has layers only.

    Args:
        base: What `load_layers` returned.
        hidden: Hidden states before the first layer, `[B, S, h]`, in the weights' dtype.
        attention_mask: `[B, S]`, 1 for tokens and 0 for padding; None for no padding.
        position_ids: `[B, S]` or `[1, S]`, or None for what the whole model does without.
        cache: See `FrozenSpan.forward`.

    Returns:
        Hidden states after the last layer, `[B, S, h]`.
    """
    output = base(
        inputs_embeds=hidden,
        attention_mask=attention_mask,
        position_ids=position_ids,
        cache=cache,
        use_cache=cache is not None,
    )
    result: Tensor = output.last_hidden_state
    return result


def _layers_of(span: Span | SplitPlan, n_layers: int) -> Span:
    if isinstance(span, SplitPlan):
        span.check_layers(n_layers)
        return span.cloud
    if not len(span) or span.stop > n_layers:
        raise PlanError(
            f"the model has {n_layers} layers, so there is no span {span}; choose layers within 0:{n_layers}"
        )
    return span


def _strip(base: Any, family: Family) -> None:
    """Take everything but the layers out of a base model, which keeps looping over what is left."""
    setattr(base, family.embedding, None)
    if getattr(base, family.norm) is not None:
        setattr(base, family.norm, nn.Identity())
    if family.positions is not None:
        setattr(base, family.positions, _NoPositions())
    for name in family.projections:
        setattr(base, name, None)
