"""Calls of a link to the span of a tiny cloud."""

from __future__ import annotations

import torch
from support.models.tiny import HIDDEN

from isthmus.edge.client.link import Link


def hidden(seed: int = 0, rows: int = 2, length: int = 6) -> torch.Tensor:
    return torch.randn(rows, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
POSITIONS = torch.arange(6)[None]


def three_calls(link: Link) -> list[torch.Tensor]:
    """Two forwards, then their backwards in reverse order: the traffic of two accumulated micro-batches."""
    results, kept = [], []
    for seed in (1, 2):
        output, handle = link.forward_span(hidden(seed), MASK, POSITIONS, keep=True)
        results.append(output.clone())
        kept.append((handle, seed))
    for handle, seed in reversed(kept):
        results.append(link.backward_span(handle, hidden(seed + 10), hidden(seed), MASK, POSITIONS).clone())
    return results
