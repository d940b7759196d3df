"""What the attacks got, as one number that a budget limits."""

from __future__ import annotations

import pytest
import torch

from isthmus.edge.budget.measured_leak import worst_leak
from isthmus.privacy.ledger.judged_attacks import Judged, Truth
from isthmus.privacy.measures.bootstrap import share_interval
from isthmus.privacy.measures.token_accuracy import Hits


@pytest.mark.parametrize(("n_texts", "least"), [(16, 3 / 16), (2, 1.0)])
def test_more_hits_never_lower_the_bound(n_texts: int, least: float) -> None:
    truth = Truth(tuple(torch.arange(20) for _ in range(n_texts)))
    bounds = []
    for hits in (0, 1, 5, 20 * n_texts):
        right = torch.tensor([min(20, max(0, hits - 20 * text)) for text in range(n_texts)]).double()
        accuracy = share_interval(Hits(right, torch.full((n_texts,), 20.0)))
        bounds.append(worst_leak("tokens", [Judged("a", "known", token_accuracy=accuracy)], 1.0, truth).bound)
    assert bounds == sorted(bounds)
    assert bounds[0] == bounds[1] == least
    assert bounds[-1] == 1
