"""Calls of two sessions to an executor, and what autograd makes of them."""

from __future__ import annotations

import torch
from support.models.tiny import HIDDEN

from isthmus.backbone.split.span import FrozenSpan, SpanInput
from isthmus.cloud.engine.executor import Executor

A, B = b"session a", b"session b"
BIG = 1 << 30


def inputs(seed: int = 0, rows: int = 2, length: int = 12, *, masked: bool = False) -> SpanInput:
    hidden = torch.randn(rows, length, HIDDEN, generator=torch.Generator().manual_seed(seed))
    mask = None
    if masked:
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[1:, -3:] = 0
    return SpanInput(hidden, mask, torch.arange(length)[None])


def upstream(seed: int = 9, rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randn(rows, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


def direct(span: FrozenSpan, given: SpanInput, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = given.hidden.clone().requires_grad_(True)
    output = span(leaf, given.attention_mask, given.position_ids)
    (expected,) = torch.autograd.grad(output, leaf, gradient)
    return output.detach(), expected


def counted(executor: Executor) -> int:
    """What the activation cache holds: inputs, and each graph once."""
    entries = executor.cache._entries.values()
    graphs = {id(entry.graph): entry.graph.nbytes for entry in entries if entry.graph is not None}
    return sum(entry.inputs.nbytes for entry in entries) + sum(graphs.values())
