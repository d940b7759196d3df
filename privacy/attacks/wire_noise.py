"""What defence and codec add to a hidden state, learned from public texts: how far from a candidate is too far."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDING = 1e-8  # variance of the noise at least, of a channel's own: other kernels round otherwise


class WireNoise:
    """The covariance of the noise, by which distances are measured: a direction counts by how quiet it is.

    Args:
        noise: What came less what was expected, `[N, h]`.
        states: Hidden states of which it is, or others of their kind, `[M, h]`.
        correlated: Whether the channels' noise is taken as correlated, which takes many more samples than channels.
        drift: What came less what was expected by a front that is not quite the edge's, `[K, h]`; it adds to the noise.
    """

    def __init__(self, noise: Tensor, states: Tensor, *, correlated: bool, drift: Tensor | None = None) -> None:
        noise, variance = noise.double(), states.double().var(0)
        covariance = noise.T @ noise / len(noise)
        if not correlated:
            covariance = covariance.diag().diag()
        floor = _ROUNDING * variance.clamp_min(variance.mean() * _ROUNDING)
        if drift is not None:
            floor = floor + drift.double().square().mean(0)
        inverse = torch.linalg.cholesky(covariance + floor.diag()).inverse()
        self._whiten = inverse.T.float()

    def distances(self, expected: Tensor, arrived: Tensor) -> Tensor:
        """Root mean square of the whitened difference, `[m]`, of `[m, h]` from `[h]` or `[m, h]`; 1 for noise alone."""
        whitened: Tensor = (arrived - expected) @ self._whiten
        return whitened.square().mean(-1).sqrt()
