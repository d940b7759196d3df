"""Clipping, and Gaussian noise on what goes up (Dwork and Roth 2014, appendix A).

Each token's hidden state is scaled down to the norm C, and normal noise of standard deviation σC is added to each
number; likewise the token's gradient, with a C and a σ of its own. What lies on padding is sent as zeros, since it
attends to the text.

Claims: an example's own messages, of T tokens at a time, differ from those of another example of the same length by at
most 2C√T, so they are (ε, δ)-differentially private; the accountant adds up tokens, passes and directions. Nothing is
gained by subsampling, as the cloud sees every message. The adapters depend on all examples, and so do the other
examples' messages: what these tell is covered only with `dp-sgd` beside it. Where gradients go up without noise of
their own, nothing is claimed.

With `memo`, a hidden state has the same noise in each pass, a function of the example's tokens and the key. Then
repeated passes do not average it out, and all of them count as one, as long as nothing below the cut is trained or
drops out. Where something does, two passes show the exact change between them, and nothing is claimed. Examples of the
same tokens have the same noise, so the cloud sees that they are the same. Gradients always get fresh noise.

Not claimed: that text is hidden.
"""

from __future__ import annotations

from torch import Tensor

from isthmus.privacy.defences.defence import Defence, Pass, clipped
from isthmus.privacy.defences.defence_options import Gaussian


class GaussianNoise(Defence):
    """See the top of the file."""

    def __init__(self, options: Gaussian, width: int) -> None:
        super().__init__(options, width)
        self._options = options

    def hidden(self, hidden: Tensor, now: Pass) -> Tensor:
        """See `Defence`."""
        draw = now.memoised_normal if self._options.memo else now.fresh_normal
        noise = draw(self.width, "gaussian/hidden") * (self._options.sigma * self._options.clip)
        return (clipped(hidden, self._options.clip) * now.real.unsqueeze(-1) + noise).to(hidden.dtype)

    def gradient(self, gradient: Tensor, now: Pass) -> Tensor:
        """See `Defence`."""
        clip, sigma = self._options.gradient_clip, self._options.gradient_sigma
        if clip is None or sigma is None:
            return gradient
        noise = now.fresh_normal(self.width, "gaussian/gradient") * (sigma * clip)
        return (clipped(gradient, clip) * now.real.unsqueeze(-1) + noise).to(gradient.dtype)
