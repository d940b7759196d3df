"""A learned bottleneck at the cut: down to a few numbers a token, and up again, both on the edge.

What crosses has the width of the hidden state, as the frozen span needs it, and lies in a space of `rank` dimensions.
The pair is trained with the adapters. With `clip` and `sigma`, the code between down and up is clipped to the norm C
and gets normal noise of standard deviation σC in each number; what lies on padding has code 0.

Claims: with noise, what goes up forward is computed from the noisy code, so that `gaussian`'s claim holds for it, with
the same unit and the same gaps; gradients need noise of their own (`gaussian`, with its gradient_clip). Without noise
nothing.

The pair is in the checkpoints, and the adapter was trained behind it: in generation and evaluation without it, the
adapter meets hidden states that it does not know.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isthmus.privacy.defences.defence import Defence, Pass, clipped
from isthmus.privacy.defences.defence_options import TrainedBottleneck


class BottleneckPair(Defence):
    """See the top of the file. It begins as a projection onto random directions."""

    def __init__(self, options: TrainedBottleneck, width: int) -> None:
        super().__init__(options, width)
        if options.rank > width:
            raise ValueError(f"bottleneck: rank = {options.rank} is more than the hidden states' {width} numbers")
        self._options = options
        # Not secret, and not of the run's random state, whose other uses it must not move.
        start = torch.randn(width, options.rank, generator=torch.Generator().manual_seed(0))
        basis = torch.linalg.qr(start).Q
        self._down, self._up = (
            nn.Linear(*sizes, bias=False) for sizes in ((width, options.rank), (options.rank, width))
        )
        with torch.no_grad():
            self._down.weight.copy_(basis.T)
            self._up.weight.copy_(basis)

    def hidden(self, hidden: Tensor, now: Pass) -> Tensor:
        """See `Defence`."""
        code: Tensor = self._down(hidden.float())
        clip, sigma = self._options.clip, self._options.sigma
        if clip is not None and sigma is not None:
            noise = now.fresh_normal(self._options.rank, "bottleneck") * (sigma * clip)
            code = clipped(code, clip) * now.real.unsqueeze(-1) + noise
        sent: Tensor = self._up(code)
        return sent.to(hidden.dtype)

    def module(self) -> nn.Module:
        """See `Defence`."""
        return nn.ModuleDict({"down": self._down, "up": self._up})
