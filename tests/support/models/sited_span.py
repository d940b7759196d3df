"""A span that takes adapters inside and computes nothing: for tests of what an edge does without asking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from isthmus.backbone.sites.edge_sites import Site


class Sited:
    """Gives back what it gets; see `isthmus.backbone.split.edge_model.SitedSpan`."""

    def __call__(self, hidden: Tensor, mask: Any, positions: Any) -> Tensor:
        return hidden

    def expect_sites(self, sites: Sequence[Site]) -> None: ...

    def at_sites(self, hidden: Tensor, mask: Any, positions: Any, sites: Sequence[Site]) -> Tensor:
        return hidden
