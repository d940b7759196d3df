"""The first layers of a model as an attacker runs them: forwards, and many candidates for one position at once.

transformers' own base model does the work, so embeddings, learned and rotary positions, and windows are the model's.
Its list of layers ends in a module that keeps what comes to it: the hidden states at the cut.

Candidates for the next position share a forward. All have the same position id, and a mask lets each see the tokens
before and itself; their keys and values are then removed from the cache. So a hundred candidates cost one forward of a
hundred positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from isthmus.backbone.decoding.key_values import LayerKeyValues
from isthmus.backbone.families import family_of, longest_sequence
from isthmus.backbone.split.span import LayerStandIn, check_length, sharing_copy
from isthmus.backbone.split.split_cache import window_of
from isthmus.common.errors import PlanError

_CHUNK = 256
"""Candidates of one forward at most: attention computes every pair of its positions, also those that a mask hides."""


class _Cut(LayerStandIn):
    """The place of the cloud's first layer: keeps its input."""

    arrived: Tensor

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        self.arrived = hidden_states
        return hidden_states


class Prefix:
    """Tokens that candidates follow: the keys and values of the front's layers, and how many there are.

    Args:
        n_layers: The front's layers.
    """

    def __init__(self, n_layers: int) -> None:
        # Without windows: the masks say what is seen, and a crop finds everything.
        self.cache = Cache([LayerKeyValues() for _ in range(n_layers)]) if n_layers else None
        self.length = 0

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens."""
        if self.cache is not None:
            for layer in self.cache.layers:
                layer.crop(length - self.length)
        self.length = length


class Front:
    """Embedding and the first layers of a model. Shares the model's weights, in eval mode.

    Args:
        model: A whole transformers model of a supported family.
        bottom: The number of layers.

    Attributes:
        embedding: Token embedding, `[V, e]`.
        longest: Token positions of a sequence that the model is made for.

    Raises:
        PlanError: The model has no layer after these.
        UnsupportedFamilyError: The architecture cannot be cut.
    """

    def __init__(self, model: Any, bottom: int) -> None:
        family = family_of(model.config)
        base = model.get_submodule(family.base)
        layers = list(getattr(base, family.layers))
        if not 0 <= bottom < len(layers):
            raise PlanError(f"a front of {bottom} layers leaves nothing of a model of {len(layers)}; use less")
        self._base: Any = sharing_copy(base).eval()
        self._cut = _Cut(layers[bottom])
        self._layers = family.layers
        self._counts_tokens = family.name == "opt"
        self._set_layers([*getattr(self._base, family.layers)[:bottom], self._cut])
        config = model.config
        self._types: list[str] | None = getattr(config, "layer_types", None)
        entries = DynamicCache(config=config).layers
        self._windows = [window_of(entries[layer]) for layer in range(bottom + 1)]
        self.embedding: Tensor = getattr(base, family.embedding).weight.detach()
        self.longest = longest_sequence(config)

    def _set_layers(self, layers: list[nn.Module]) -> None:
        setattr(self._base, self._layers, nn.ModuleList(layers))

    @property
    def layers(self) -> nn.ModuleList:
        """The front's own layers."""
        layers: nn.ModuleList = getattr(self._base, self._layers)
        return layers[:-1]

    def with_own_layers(self) -> Front:
        """A front with copies of the layers, which may be trained; everything else is shared."""
        front = copy.copy(self)
        front._base = sharing_copy(self._base)
        front._set_layers([*copy.deepcopy(self.layers), self._cut])
        return front

    def counted(self, columns: Tensor) -> Tensor:
        """The positions that the model counts by itself for tokens in these columns of a padded row, `[n]`."""
        return torch.arange(len(columns)) if self._counts_tokens else columns

    @contextmanager
    def changed_embedding(self, made: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While the block runs, the first layer gets what is made of the embedding's `[1, n, e]`."""
        hook = self._base.get_input_embeddings().register_forward_hook(lambda _, __, embedded: made(embedded))
        try:
            yield
        finally:
            hook.remove()

    def states(self, tokens: Tensor, *, graph: bool = False) -> Tensor:
        """Hidden states at the cut, `[n, h]`, of a text `[n]`; with `graph`, gradients flow to the layers.

        Raises:
            ConfigError: The text is longer than the model is made for.
        """
        n = len(tokens)
        check_length(self.longest, n)
        with torch.set_grad_enabled(graph):
            return self._run(tokens, torch.arange(n), torch.ones(n, n, dtype=torch.bool).tril(), None)

    def begin(self) -> Prefix:
        """An empty prefix."""
        return Prefix(len(self.layers))

    @torch.no_grad()
    def extend(self, prefix: Prefix, tokens: Tensor, positions: Tensor) -> Tensor:
        """Hidden states `[n, h]` of the next tokens `[n]` at positions `[n]`, which the prefix then has."""
        n = len(tokens)
        sees = torch.ones(n, prefix.length + n, dtype=torch.bool).tril(prefix.length)
        hidden = self._run(tokens, positions, sees, prefix)
        prefix.length += n
        return hidden

    @torch.no_grad()
    def candidates(self, prefix: Prefix, tokens: Tensor, position: Tensor) -> Tensor:
        """Hidden states `[m, h]` of each of `tokens` `[m]`, were it the next one, at `position` `[]`.

        The prefix stays as it is.
        """
        hidden, length = [], prefix.length
        for chunk in torch.split(tokens, _CHUNK):
            m = len(chunk)
            sees = torch.cat([torch.ones(m, length, dtype=torch.bool), torch.eye(m, dtype=torch.bool)], 1)
            hidden.append(self._run(chunk, position.expand(m), sees, prefix, at=length))
            prefix.length += m
            prefix.crop(length)
        return torch.cat(hidden)

    def _run(
        self, tokens: Tensor, positions: Tensor, sees: Tensor, prefix: Prefix | None, at: int | None = None
    ) -> Tensor:
        """Run the layers.

        Args:
            sees: Which earlier ones and which of themselves the tokens see where there is no window, `[n, P + n]`.
            at: The place of all tokens in the sequence; None where they follow each other.
        """
        cache = None if prefix is None else prefix.cache
        n, reach = sees.shape
        places = torch.arange(reach)
        if at is not None:
            places = places.clamp_max(at)
        distance = places[reach - n :, None] - places[None]
        masks: dict[int | None, Tensor] = {}
        for window in set(self._windows):
            seen = sees if window is None else sees & (distance < window)
            masks[window] = torch.zeros(1, 1, n, reach).masked_fill(~seen, torch.finfo(torch.float32).min)
        mask: Any = masks[self._windows[0]]
        if self._types is not None:
            mask = {kind: masks[window] for kind, window in zip(self._types, self._windows, strict=False)}
        self._base(
            input_ids=tokens[None],
            position_ids=positions[None],
            attention_mask=mask,
            cache=cache,
            use_cache=cache is not None,
        )
        arrived = self._cut.arrived[0]
        del self._cut.arrived
        return arrived
