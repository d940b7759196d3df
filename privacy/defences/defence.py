"""What a defence is: functions of what goes up, and of what it is told of the pass.

A defence that changes nothing in a place leaves that function as it is here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isthmus.privacy.defences.defence_options import DefenceOptions
from isthmus.privacy.defences.secret_noise import Label, SecretNoise

IGNORED = -100  # the label that cross entropy leaves out


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """One pass of a micro-batch through the span.

    Attributes:
        noise: Draws what is secret.
        turn: Which pass of the run it is, and what the cloud had answered before: no other one has the same. Only a
            step that is made again, and gets the same answers, has the same turn again.
        ids: Token ids, `[B, S]`.
        real: Where a row has tokens, `[B, S]` bool. What lies there on padding says something of the text as well, as
            padding attends to it.
    """

    noise: SecretNoise
    turn: tuple[Label, ...]
    ids: Tensor
    real: Tensor

    def contents(self) -> list[bytes]:
        """The tokens of each row, without padding, as the bytes that stand for an example."""
        rows = zip(self.ids.to(torch.int64).cpu(), self.real.cpu(), strict=True)
        return [ids[real].numpy().tobytes() for ids, real in rows]

    def fresh_normal(self, width: int, purpose: str) -> Tensor:
        """Standard normal noise of this turn alone, `[B, S, width]` fp32, 0 on padding."""
        drawn = self.noise.normal((*self.real.shape, width), purpose, *self.turn)
        return drawn.to(self.real.device) * self.real.unsqueeze(-1)

    def spread(self, rows: list[Tensor]) -> Tensor:
        """Rows `[tokens of the row, width]` where the tokens are, `[B, S, width]` fp32, 0 on padding."""
        placed = torch.zeros(*self.real.shape, rows[0].shape[-1], device=self.real.device)
        for index, row in enumerate(rows):
            placed[index, self.real[index]] = row.to(placed)
        return placed

    def memoised_normal(self, width: int, purpose: str) -> Tensor:
        """Standard normal noise that an example has in every pass, `[B, S, width]` fp32, 0 on padding."""
        lengths = self.real.sum(-1).tolist()
        return self.spread(
            [
                self.noise.normal((length, width), purpose, content)
                for length, content in zip(lengths, self.contents(), strict=True)
            ]
        )


class Defence:
    """One defence, with its parameters.

    Args:
        options: Its parameters.
        width: Of the hidden states.
    """

    def __init__(self, options: DefenceOptions, width: int) -> None:
        self.width = width

    def embedded(self, embedded: Tensor, now: Pass) -> Tensor:
        """What the embedding gives to the first layer, `[B, S, h]`."""
        return embedded

    def hidden(self, hidden: Tensor, now: Pass) -> Tensor:
        """The hidden states that are sent, `[B, S, h]`; gradients flow back through it."""
        return hidden

    def output(self, output: Tensor, now: Pass) -> Tensor:
        """What the edge makes of the answer, `[B, S, h]`; gradients flow back through it."""
        return output

    def gradient(self, gradient: Tensor, now: Pass) -> Tensor:
        """The gradient of the answer that is sent, `[B, S, h]`."""
        return gradient

    def extra_loss(self, logits: Tensor, labels: Tensor, now: Pass) -> Tensor | None:
        """What is added to a micro-batch's loss in training; None for nothing.

        Args:
            logits: `[B, S, V]`.
            labels: `[B, S]`, -100 where there is none; those at `s` are predicted at `s - 1`.
        """
        return None

    def module(self) -> nn.Module | None:
        """What is trained beside the adapters; None for nothing."""
        return None


def clipped(vectors: Tensor, norm: float) -> Tensor:
    """Vectors along the last dimension, those longer than `norm` scaled down to it; fp32."""
    vectors = vectors.float()
    scale: Tensor = norm / vectors.norm(dim=-1, keepdim=True).clamp_min(norm)
    return vectors * scale
