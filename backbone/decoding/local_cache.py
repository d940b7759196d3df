"""A cache of layers that run in this process: what the cloud keeps, without a cloud."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from isthmus.backbone.decoding.key_values import KeyValues, RunsLayers
from isthmus.backbone.sites.edge_sites import Site
from isthmus.backbone.split.span import SpanInput, run_layers
from isthmus.common.errors import UnsupportedCallError


class LocalLayers(RunsLayers, Protocol):
    """Layers of this process: a `FrozenSpan`, or an emulator."""

    @property
    def base(self) -> nn.Module:
        """transformers' base model with these layers and nothing else."""


class LocalCache:
    """A `RemoteCache` over keys and values of this process; see `isthmus.backbone.split.split_cache`.

    Args:
        layers: The layers.

    Attributes:
        keys: Their keys and values.
    """

    def __init__(self, layers: LocalLayers) -> None:
        self.version: Any = None
        self.keys = KeyValues(layers)
        self._base = layers.base

    @property
    def length(self) -> int:
        """Token positions."""
        return self.keys.length

    @property
    def rows(self) -> int:
        """Sequences."""
        return self.keys.rows

    def extend(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, sites: Sequence[Site] = ()
    ) -> Tensor:
        """The layers' output `[B, S, h]` for the next tokens; see `RemoteCache.extend`. After a failure as before.

        Raises:
            UnsupportedCallError: There are sites, and these layers take none.
        """
        start = self.length
        try:
            with torch.no_grad():
                return self._run(SpanInput(hidden, attention_mask, position_ids), sites)
        except BaseException:
            self.crop(start)
            raise

    def crop(self, length: int) -> None:
        """Forget what comes after so many positions."""
        self.keys.keep(length)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows."""
        self.keys.select(rows)

    def _run(self, inputs: SpanInput, sites: Sequence[Site]) -> Tensor:
        if sites:
            raise UnsupportedCallError(f"{sites[0].name} carries an adapter, and the layers here take none")
        return run_layers(self._base, inputs.hidden, inputs.attention_mask, inputs.position_ids, self.keys)
