"""What does not protect, each with the attack that breaks it (`broken_by` of its options).

`rotation` sends hidden states turned by a secret orthogonal matrix and turns the answer back. The span is not
equivariant to rotations, so the model breaks; and the matrix is linear, so a few known texts give it away. A rotation
that the cloud undoes protects nothing: it must know the matrix.

`quantization` rounds each token's numbers to a few bits. The attacker rounds its candidates alike.

Two more cannot be switched on, as they change nothing that is sent (`NO_DEFENCE`): a permuted vocabulary, and depth.

They claim nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.privacy.defences.defence import Defence, Pass
from isthmus.privacy.defences.defence_options import Quantization


class SecretRotation(Defence):
    """See the top of the file."""

    def hidden(self, hidden: Tensor, now: Pass) -> Tensor:
        """See `Defence`."""
        return hidden @ self._matrix(now).to(hidden)

    def output(self, output: Tensor, now: Pass) -> Tensor:
        """See `Defence`."""
        return output @ self._matrix(now).to(output).T

    def _matrix(self, now: Pass) -> Tensor:
        matrix: Tensor = torch.linalg.qr(now.noise.normal((self.width, self.width), "rotation")).Q
        return matrix


class Rounding(Defence):
    """See the top of the file; the gradient passes as if nothing were rounded."""

    def __init__(self, options: Quantization, width: int) -> None:
        super().__init__(options, width)
        self._most = 2 ** (options.bits - 1) - 1

    def hidden(self, hidden: Tensor, now: Pass) -> Tensor:
        """See `Defence`."""
        plain = hidden.detach()
        scale = plain.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(plain.dtype).tiny) / self._most
        rounded: Tensor = (plain / scale).round() * scale
        return hidden + (rounded - plain)
