"""Noise whose size is learned for each channel, after Shredder (Mireshghallah et al. 2020, ASPLOS).

What is sent is the hidden state plus normal noise, fresh in each pass. Each channel has a standard deviation of its
own, which is trained with the adapters: the loss pulls it down where the model needs the channel, and a reward for
its mean logarithm pulls it up elsewhere. So the noise grows for as long as the run trains.

Claims: nothing. Hidden states are not clipped, and channels that the model needs stay readable; noise in the channels
that it does not need takes nothing from an attacker who weighs channels by their noise.

The deviations are in the checkpoints; generation and evaluation without the noise are the adapter's alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from isthmus.privacy.defences.defence import Defence, Pass
from isthmus.privacy.defences.defence_options import LearnedNoise


class ChannelNoise(Defence):
    """See the top of the file."""

    def __init__(self, options: LearnedNoise, width: int) -> None:
        super().__init__(options, width)
        self._reward = options.reward
        self._log = nn.Parameter(torch.full((width,), math.log(options.sigma)))

    @property
    def deviations(self) -> Tensor:
        """The standard deviation of each channel's noise, `[h]`."""
        return self._log.exp()

    def hidden(self, hidden: Tensor, now: Pass) -> Tensor:
        """See `Defence`."""
        noise = now.fresh_normal(self.width, "learned-noise") * self.deviations
        return hidden + noise.to(hidden.dtype)

    def extra_loss(self, logits: Tensor, labels: Tensor, now: Pass) -> Tensor:
        """See `Defence`."""
        return -self._reward * self._log.mean()

    def module(self) -> nn.Module:
        """See `Defence`."""
        return nn.ParameterDict({"log": self._log})
