"""The side network of ladder side-tuning: it reads the cloud's layers and is added to their output.

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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from isthmus.backbone.sites.low_rank_basis import seeded_matrix
from isthmus.common.errors import ConfigError

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
        """`side` is `[B, S, width]`; `rest` has the base model's other arguments of a layer (mask, rotary angles)."""
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
        """Add the side network's output to what the span returned. Nothing that is given gets a gradient.

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
