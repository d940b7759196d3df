"""Which candidate explains a position's gradient best: one label, or two where rows are mixed.

The gradient is linear in what the position is to predict. So where a row has the share s of itself, and its partner the
rest, the gradient has the direction `s * d(own) + (1 - s) * d(partner's)`, d(y) being that of the label y alone. All
pairs of a list are compared. A pair of twice the same token is a single label: where both rows have the same one, or
one row alone has any.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_TINY = 1e-30


class Choice(NamedTuple):
    """The best of each position.

    Attributes:
        picked: Which of the list, `[S, 1]`, or `[S, 2]` for the own one and the partner's.
        direction: Of the gradient, were they the labels, `[S, h]`.
        cosine: With what is to be explained, `[S]` fp64: a right label leaves less of it than fp32 can tell from 1.
        others: The share of the power that the others leave at least, `[S]`.
    """

    picked: Tensor
    direction: Tensor
    cosine: Tensor
    others: Tensor


def choose(left: Tensor, directions: Tensor, prior: Tensor, twice: Tensor, own_share: float) -> Choice:
    """The likeliest labels of each position.

    Args:
        left: What is to be explained, `[S, h]`.
        directions: The gradient of each candidate, `[S, candidates, h]`.
        prior: The log probability of each in the model's view, `[S, candidates]`.
        twice: Twice the noise's power in each number, `[S, 1]`.
        own_share: Of the row itself, where rows are mixed; 1 where they are not.
    """
    exact, count = directions.double(), directions.shape[1]
    along = (exact @ left.double().unsqueeze(-1)).squeeze(-1)
    if own_share == 1:
        squares = exact.square().sum(-1)
    else:
        gram = exact @ exact.transpose(1, 2)
        own, other = own_share, 1 - own_share
        squares = gram.diagonal(dim1=1, dim2=2)
        squares = own**2 * squares[:, :, None] + 2 * own * other * gram + other**2 * squares[:, None]
        squares = squares.flatten(1)
        along = (own * along[:, :, None] + other * along[:, None]).flatten(1)
        alike = torch.eye(count, dtype=torch.bool)
        prior = (prior[:, :, None] + prior[:, None].masked_fill(alike, 0)).flatten(1)
    along = along / squares.clamp_min(_TINY).sqrt()
    best = (along.abs() * along / twice + prior).argmax(-1)
    cosines = along / left.double().norm(dim=-1, keepdim=True).clamp_min(_TINY)
    others = 1 - cosines.scatter(1, best[:, None], 0).square().max(1).values
    places = torch.arange(len(left))
    if own_share == 1:
        picked, direction = best[:, None], directions[places, best]
    else:
        picked = torch.stack([best // count, best % count], 1)
        direction = own_share * directions[places, picked[:, 0]] + (1 - own_share) * directions[places, picked[:, 1]]
    return Choice(picked, direction, cosines[places, best], others)


def without_best(left: Tensor, directions: Tensor, prior: Tensor, twice: Tensor) -> Tensor:
    """What the likeliest single label of a list leaves of `left`, `[S, h]`: it shows what may be mixed with it."""
    best = choose(left, directions, prior, twice, 1).direction
    scale = (left * best).sum(-1, keepdim=True) / best.square().sum(-1, keepdim=True).clamp_min(_TINY)
    return left - scale * best
