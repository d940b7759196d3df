"""The cloud's layers as one differentiable function of hidden states.

The backbone is frozen, so the function has one input that can want a gradient. The input is kept on the edge until the
backward has been answered: whatever happens to the cloud's stash or to the connection, the call can be repeated and
gives the same bits (Petals keeps inputs for the same reason, Borzunov et al., 2023).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class SpanLink(Protocol):
    """What the remote span needs of a link."""

    def forward_span(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, *, keep: bool
    ) -> tuple[Tensor, Any]:
        """Run the span; returns its output and a handle for its backward."""

    def backward_span(
        self, kept: Any, gradient: Tensor, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        """Gradient of the span's input; the inputs are there in case the cloud has forgotten them."""


class RemoteSpan:
    """Calls the cloud's span: `(hidden, attention_mask, position_ids) -> hidden`.

    Deliberately not an `nn.Module`: it owns no weights, and a link has no place in a state dict or a copy of the model.
    """

    def __init__(self, link: SpanLink) -> None:
        self._link = link

    def __call__(self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Hidden states [batch, sequence, hidden size] after the span; same dtype and device as the input."""
        # Nothing trainable below the span, or no gradients wanted: no backward will come, and the cloud need not keep
        # anything for it.
        keep = torch.is_grad_enabled() and hidden.requires_grad
        output: Tensor = _SpanFunction.apply(hidden, attention_mask, position_ids, self._link, keep)  # type: ignore[no-untyped-call]  # torch
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteSpan:
        """A copied model talks over the same link."""
        return self


class _SpanFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, mask: Tensor | None, positions: Tensor | None, link: SpanLink, keep: bool
    ) -> Tensor:
        output, kept = link.forward_span(hidden, mask, positions, keep=keep)
        if keep:
            ctx.save_for_backward(hidden, mask, positions)
            ctx.link, ctx.kept = link, kept
        return output.to(device=hidden.device, dtype=hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        hidden, mask, positions = ctx.saved_tensors
        result = ctx.link.backward_span(ctx.kept, gradient, hidden, mask, positions)
        return result.to(device=hidden.device, dtype=hidden.dtype), None, None, None, None
