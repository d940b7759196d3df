"""Mixing two examples in each row, as mixup does (Zhang et al. 2018).

A row's hidden states become λ times its own and 1 - λ times those of another row of the micro-batch, token by token;
where the other is shorter, it begins again. The loss is mixed alike. Partners are drawn anew for each pass.

Claims: nothing. Matching can take the larger part for the text, and gradients give the labels of both rows;
`isthmus experiment leak --row mixing` measures it.

Held-out examples are mixed as well when they are evaluated, so the losses that a run reports are those of mixed rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from isthmus.common.errors import ConfigError
from isthmus.privacy.defences.defence import IGNORED, Defence, Pass
from isthmus.privacy.defences.defence_options import Mixing


class RowMixing(Defence):
    """See the top of the file.

    Attributes:
        own: λ, the weight of the row itself.
    """

    def __init__(self, options: Mixing, width: int) -> None:
        super().__init__(options, width)
        self.own = options.share

    def hidden(self, hidden: Tensor, now: Pass) -> Tensor:
        """See `Defence`.

        Raises:
            ConfigError: A row is alone in its micro-batch.
        """
        partner, place = _partners(now)
        other = hidden[partner.unsqueeze(-1), place]
        mixed = self.own * hidden + (1 - self.own) * other
        return mixed * now.real.unsqueeze(-1).to(hidden.dtype)  # what lies on padding is of the own text alone

    def extra_loss(self, logits: Tensor, labels: Tensor, now: Pass) -> Tensor:
        """See `Defence`: it makes of the own labels' loss that of both."""
        partner, place = _partners(now)
        ahead = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)], dim=1)
        theirs = ahead[partner.unsqueeze(-1), place].masked_fill(~now.real, IGNORED)
        count = (ahead != IGNORED).sum()
        own, other = (
            cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="sum", ignore_index=IGNORED) / count
            for wanted in (ahead, theirs)
        )
        return (1 - self.own) * (other - own)


def _partners(now: Pass) -> tuple[Tensor, Tensor]:
    """The partner of each row, `[B]`, and the place there of each of its tokens, `[B, S]`."""
    rows = len(now.real)
    if rows < 2:
        raise ConfigError(
            "mixing takes two examples of a micro-batch, and one has a single example: choose --batch so that none is "
            "left alone at the end of the training data or of the held-out ones"
        )
    order = now.noise.order(rows, "mixing", *now.turn)
    partner = torch.empty(rows, dtype=torch.long)
    partner[order] = torch.tensor(order[1:] + order[:1])
    partner = partner.to(now.real.device)
    # Where the partner's tokens are, in their order, and over again.
    first = now.real.long().argmax(-1)[partner].unsqueeze(-1)
    tokens = now.real.sum(-1)[partner].unsqueeze(-1)
    own = now.real.long().cumsum(-1) - 1
    return partner, first + own.clamp_min(0) % tokens
