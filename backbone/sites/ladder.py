"""Ladder side-tuning: a narrow network on the edge that reads the cloud's layers and is added to their output.

LST (Sung et al. 2022, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning") trains a side
network of the backbone's width over `reduction`. Its layer `k` gets

    mu_k * down_k(tap_k) + (1 - mu_k) * side_(k-1),    mu_k = sigmoid(alpha_k / 0.1),    alpha_k = 0 at the start

where `tap_k` is what a decoder layer of the backbone returned, and `side_0 = down(what the span got)`. No gradient
flows into the backbone, so the cloud is asked for forwards only, and its answers can be kept for the next epochs.

What is ours:

- The result is `span output + rms * up(side)`, `rms` the output's root mean square at that position, and `up` zero at
  the start. So training starts at the pretrained model, and one learning rate suits hidden states of any size: what
  follows normalises them. LST's code predicts from the side network alone, or from a gated mean of both, and starts
  the side network from the backbone's pruned weights, which the edge does not have.
- The side layers are small Llama layers whatever the backbone is, as nothing is copied from it. As in LST they attend,
  and have as many heads as the backbone's where their width can be divided so.
- Each tap is normalised (RMSNorm) before `down`, as a few of a backbone's hidden numbers can be a thousand times as
  large as the rest ("massive activations", Sun et al. 2024).
- A tap may come narrower than the backbone, through a fixed random projection (`tap_projection`), to save bytes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from isthmus.backbone.families import family_of
from isthmus.backbone.plan import Span
from isthmus.backbone.sites.low_rank import seeded_matrix
from isthmus.backbone.sites.site_spec import Placement, SiteSpec
from isthmus.common.errors import CheckpointError, ConfigError, UnsupportedCallError

LADDER = "isthmus_ladder"
"""The name of the side network inside the model."""
_TEMPERATURE = 0.1  # of the gates, as in the paper


def tap_projection(layer: int, hidden_size: int, width: int, seed: int) -> Tensor:
    """The fixed random matrix that the cloud makes a tap narrower with, the same bits for both sides.

    By the lemma of Johnson and Lindenstrauss (1984) it keeps the distances between hidden states, up to one common
    factor; independent uniform numbers do as well as normal ones (Achlioptas 2003).

    Args:
        layer: The layer that is tapped.
        hidden_size, width: Widths of the hidden states and of what is sent.
        seed: 0 or more.

    Returns:
        `[width, h]`, fp32, on the CPU. What is sent is `tap @ projection.T`, whose numbers vary about as the tap's do.

    Raises:
        ConfigError: The width is no width, or more than the hidden states have.
    """
    _check_tap_width(width, hidden_size)
    return seeded_matrix(f"isthmus tap\n{seed}\n{layer}", width, hidden_size)


def side_width(hidden_size: int, reduction: int) -> int:
    """Width of the side network: the largest even number up to `hidden_size / reduction`; `ConfigError` below 2."""
    width = hidden_size // reduction // 2 * 2
    if width < 2:
        raise ConfigError(
            f"reduction {reduction} leaves nothing of a hidden size of {hidden_size}: use {hidden_size // 2} or less"
        )
    return width


def _check_tap_width(width: int, hidden_size: int) -> None:
    if not 1 <= width <= hidden_size:
        raise ConfigError(f"a tap of width {width} does not fit a hidden size of {hidden_size}: use 1 to {hidden_size}")


# The side network -----------------------------------------------------------------------------------------------------


def _down(size: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.RMSNorm(size, eps=1e-6), nn.Linear(size, width, bias=False))


class SideLayer(nn.Module):
    """One rung: mixes its tap into the side network's hidden states, then runs a small decoder layer."""

    def __init__(self, index: int, tap_size: int, width: int, block: nn.Module) -> None:
        super().__init__()
        self.index = index
        self.gate = nn.Parameter(torch.zeros(()))
        self.down = _down(tap_size, width)
        self.block = block

    def forward(self, side: Tensor, *, taps: Sequence[Tensor], **rest: Any) -> Tensor:
        """`side` is `[B, S, width]`; `rest` is what the base model tells its layers (mask, rotary angles)."""
        mu = torch.sigmoid(self.gate / _TEMPERATURE)
        mixed = mu * self.down(taps[self.index]) + (1 - mu) * side
        result: Tensor = self.block(mixed, **rest)
        return result


class LadderSide(nn.Module):
    """The side network of one span. It is the model's submodule `isthmus_ladder`, and runs on the edge.

    Its weights stay in fp32 whatever the model computes in, as PEFT keeps adapters.

    Args:
        hidden_size: Width `h` of the backbone.
        n_heads: Attention heads of the backbone.
        tap_layers: The layers that are tapped, ascending, by their indices in the whole model.
        reduction: How many times narrower the side network is.
        tap_width: Width of the taps; None for `h`.

    Attributes:
        tap_layers: As given: `forward` takes their outputs in this order.
        tap_width: Width of a tap.

    Raises:
        ConfigError: A width does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        n_heads: int,
        tap_layers: Sequence[int],
        *,
        reduction: int = 8,
        tap_width: int | None = None,
    ) -> None:
        super().__init__()
        width = side_width(hidden_size, reduction)
        self.tap_layers = tuple(tap_layers)
        self.tap_width = hidden_size if tap_width is None else tap_width
        _check_tap_width(self.tap_width, hidden_size)
        self.entry = _down(hidden_size, width)
        self.body = _small_llama(width, n_heads, len(self.tap_layers))
        self.body.layers = nn.ModuleList(
            SideLayer(index, self.tap_width, width, block) for index, block in enumerate(self.body.layers)
        )
        self.up = nn.Linear(width, hidden_size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.float()

    def forward(
        self,
        span_input: Tensor,
        taps: Sequence[Tensor],
        span_output: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Add the side network's word to what the span returned. Nothing that is given gets a gradient.

        Args:
            span_input: What the span was given, `[B, S, h]`.
            taps: What the layers of `tap_layers` returned, `[B, S, tap_width]` each.
            span_output: What the span returned, `[B, S, h]`.
            attention_mask: `[B, S]`, 1 for tokens and 0 for padding; None for no padding.
            position_ids: `[B, S]` or `[1, S]`, or None to count from 0.

        Returns:
            `[B, S, h]`, in the dtype of `span_output`.

        Raises:
            ConfigError: There are more or fewer taps than layers, or one has another shape.
        """
        shape = (*span_output.shape[:-1], self.tap_width)
        if len(taps) != len(self.tap_layers) or any(tap.shape != shape for tap in taps):
            raise ConfigError(
                f"the ladder got taps of shapes {[list(tap.shape) for tap in taps]}, but reads layers "
                f"{', '.join(map(str, self.tap_layers))} as {list(shape)} each: tap these"
            )
        dtype = self.up.weight.dtype
        side = self.body(
            inputs_embeds=self.entry(span_input.detach().to(dtype)),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            taps=[tap.detach().to(dtype) for tap in taps],
        ).last_hidden_state
        output = span_output.detach()
        size = output.to(dtype).pow(2).mean(dim=-1, keepdim=True).sqrt()
        change: Tensor = size * self.up(side)
        return output + change.to(output.dtype)


def _small_llama(width: int, n_heads: int, n_layers: int) -> Any:
    """A base model of Llama layers without an embedding; masks and rotary angles are transformers' own."""
    heads = next(n for n in range(n_heads, 0, -1) if width % n == 0 and width // n % 2 == 0)
    settings = LlamaConfig(
        vocab_size=1,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=n_layers,
        num_attention_heads=heads,
        # The usual 0.02 belongs to widths of a thousand; this keeps the size of the numbers at any.
        initializer_range=width**-0.5,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    body: Any = LlamaModel(settings)
    body.embed_tokens = None
    return body


# On a model -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LadderAdapter:
    """What a model with a ladder carries as its attribute `isthmus_adapter`.

    Attributes:
        tap_layers: The layers whose outputs are tapped, ascending, by their indices in the whole model.
        start: First layer of the span that the ladder stands beside; its input is the side network's.
        stop: One past its last layer, whose output the side network is added to.
        reduction: How many times narrower the side network is.
        tap_width: Width that taps are projected to; None for the backbone's, without a projection.
        seed: Of the projections, 0 or more.

    Raises:
        ConfigError: A value makes no sense.
    """

    tap_layers: tuple[int, ...]
    start: int
    stop: int
    reduction: int = 8
    tap_width: int | None = None
    seed: int = 0

    method: ClassVar[str] = "ladder"

    def __post_init__(self) -> None:
        for name, lowest in (("start", 0), ("stop", 1), ("reduction", 1), ("tap_width", 1), ("seed", 0)):
            value = getattr(self, name)
            if (type(value) is not int or value < lowest) and (name, value) != ("tap_width", None):
                raise ConfigError(f"{name} {value!r} of a ladder: use a whole number of {lowest} or more")
        taps = self.tap_layers
        if not taps or not all(type(layer) is int and self.start <= layer < self.stop for layer in taps):
            raise ConfigError(
                f"taps {str(list(taps))[:80]} do not lie in layers {self.start}:{self.stop}: "
                f"choose among {self.start} to {self.stop - 1}"
            )
        if list(taps) != sorted(set(taps)):
            raise ConfigError(f"taps {str(list(taps))[:80]} are out of order: name each layer once, ascending")

    def info(self) -> dict[str, Any]:
        """What `isthmus_adapter.json` says."""
        return {"method": self.method, **asdict(self), "tap_layers": list(self.tap_layers)}

    @classmethod
    def from_info(cls, info: Mapping[str, Any], path: Path) -> Self:
        """The adapter that `isthmus_adapter.json` describes.

        Raises:
            CheckpointError: It is damaged.
        """
        try:
            taps = info["tap_layers"] if isinstance(info["tap_layers"], list) else ()
            rest = [info[name] for name in ("start", "stop", "reduction", "tap_width", "seed")]
            return cls(tuple(taps), *rest)
        except (KeyError, ConfigError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): give a folder that training wrote.") from error

    def places(self, model: Any) -> dict[str, torch.Size]:
        """Names and shapes of its tensors, of which `model` is known to have places for all; nothing is allocated.

        Raises:
            ConfigError: The model has other layers or is cut elsewhere, or a width does not fit.
        """
        self._check(model)
        with torch.device("meta"):
            side = self._side(model.config)
        return {f"{LADDER}.{name}": parameter.shape for name, parameter in side.named_parameters()}

    def parameters(self, model: Any) -> dict[str, nn.Parameter]:
        """The parameters of a model that carries it, by their names in the model."""
        side: nn.Module = model.get_submodule(LADDER)
        return {f"{LADDER}.{name}": parameter for name, parameter in side.named_parameters()}

    def attach(self, model: Any) -> None:
        """Put the side network into `model`; it alone is trainable then. See `add_ladder`."""
        self._check(model)
        if hasattr(model, LADDER):
            raise ConfigError("the model has a ladder already: load the model afresh, or go on from its adapter.")
        side = self._side(model.config).to(model.device)
        model.requires_grad_(False)
        model.add_module(LADDER, side)
        model.isthmus_adapter = self
        if getattr(model, "split_plan", None) is None:
            _WholeSpan(side, self).watch(model)
        else:
            model.span_gate.attach_ladder(side, self.taps)

    @property
    def taps(self) -> tuple[SiteSpec, ...]:
        """What a span is asked for."""
        width = self.tap_width or 0
        return tuple(SiteSpec(layer, "", Placement.TAP, width, self.seed if width else 0) for layer in self.tap_layers)

    def _side(self, config: Any) -> LadderSide:
        h, n_heads = config.hidden_size, config.num_attention_heads
        return LadderSide(h, n_heads, self.tap_layers, reduction=self.reduction, tap_width=self.tap_width)

    def _check(self, model: Any) -> None:
        n_layers, plan = model.config.num_hidden_layers, getattr(model, "split_plan", None)
        span = Span(self.start, self.stop)
        if self.stop > n_layers:
            raise ConfigError(f"a ladder beside layers {span} does not fit a model of {n_layers}: stay within them")
        if plan is not None and plan.cloud != span:
            raise ConfigError(
                f"a ladder beside layers {span} does not fit a model whose cloud holds {plan.cloud}: cut it there"
            )


def add_ladder(
    model: Any,
    tap_layers: Sequence[int],
    *,
    span: Span | None = None,
    reduction: int = 8,
    tap_width: int | None = None,
    seed: int = 0,
) -> None:
    """Give a model a ladder; it alone is trainable then.

    Names are the same in a split and in a whole model. In a whole model, hooks collect the taps and change what the
    span's last layer returns. In a split one, the gate asks the span for the taps and passes its output through the
    ladder.

    Args:
        model: A transformers causal LM, whole or split.
        tap_layers: Layers of the span, ascending, by their indices in the whole model.
        span: The layers that the ladder stands beside: those that the cloud holds or would hold. None for what the
            split model's cloud holds, and for all layers of a whole one, as in LST.
        reduction, tap_width, seed: See `LadderAdapter`.

    Raises:
        ConfigError: A value makes no sense or does not fit the model, or the model has a ladder.
    """
    plan = getattr(model, "split_plan", None)
    if span is None:
        span = Span(0, model.config.num_hidden_layers) if plan is None else plan.cloud
    LadderAdapter(tuple(tap_layers), span.start, span.stop, reduction, tap_width, seed).attach(model)


class _WholeSpan:
    """Lets a whole model's own layers be the span: keeps what the ladder reads for the length of one forward."""

    def __init__(self, side: LadderSide, adapter: LadderAdapter) -> None:
        self._side = side
        self._adapter = adapter
        self._projections: dict[int, Tensor] = {}
        if adapter.tap_width is not None:
            for layer in adapter.tap_layers:
                projection = tap_projection(layer, side.up.out_features, adapter.tap_width, adapter.seed)
                self._projections[layer] = projection
        self._named: dict[str, Any] = {}
        self._seen: list[Tensor] = []  # the span's input, then the taps

    def watch(self, model: Any) -> None:
        """Put the hooks on the base model and its layers."""
        family = family_of(model.config)
        base: Any = model.get_submodule(family.base)
        layers = getattr(base, family.layers)
        # Bound methods: a deep copy of the model binds them to the copy's side network.
        base.register_forward_pre_hook(self._enter, with_kwargs=True)
        base.register_forward_hook(self._leave, always_call=True)
        layers[self._adapter.start].register_forward_pre_hook(self._keep_input)
        for layer in self._adapter.tap_layers:
            layers[layer].register_forward_hook(partial(self._keep_tap, layer))
        layers[self._adapter.stop - 1].register_forward_hook(self._climb)

    def _enter(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._named = {**kwargs, **dict(zip(inspect.signature(base.forward).parameters, args, strict=False))}
        for name in ("cache", "past_key_values"):
            cache = self._named.get(name)
            if cache is not None and cache.get_seq_length():
                raise UnsupportedCallError("a ladder keeps no key-value cache; pass use_cache=False")

    def _leave(self, *_: Any) -> None:
        self._named, self._seen = {}, []

    def _keep_input(self, _layer: nn.Module, args: tuple[Any, ...]) -> None:
        self._seen = [args[0]]

    def _keep_tap(self, index: int, _layer: nn.Module, _args: Any, output: Any) -> None:
        tap = output[0] if isinstance(output, tuple) else output
        projection = self._projections.get(index)
        self._seen.append(tap if projection is None else nn.functional.linear(tap, projection.to(tap)))

    def _climb(self, _layer: nn.Module, _args: Any, output: Any) -> Any:
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        span_input, *taps = self._seen
        mask, positions = self._named.get("attention_mask"), self._named.get("position_ids")
        result = self._side(span_input, taps, hidden, mask, positions)
        return (result, *rest) if isinstance(output, tuple) else result
