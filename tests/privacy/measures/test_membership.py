from __future__ import annotations

import pytest
import torch

from isthmus.common.errors import ConfigError
from isthmus.privacy.measures.membership import membership_auc, membership_interval, true_positive_rate


def test_the_area_counts_pairs_and_halves_ties() -> None:
    members, others = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0])
    assert membership_auc(members, others) == pytest.approx((1 + 1.5 + 2) / 6)
    assert membership_auc(others, members) == pytest.approx(1 - (1 + 1.5 + 2) / 6)


def test_scores_that_say_nothing_give_chance() -> None:
    random = torch.Generator().manual_seed(0)
    members, others = (torch.randn(4000, generator=random) for _ in range(2))
    assert membership_auc(members, others) == pytest.approx(0.5, abs=0.03)
    assert true_positive_rate(members, others) == pytest.approx(0.01, abs=0.01)


def test_the_rate_is_above_what_one_in_a_hundred_others_reach() -> None:
    others = torch.arange(1000.0)
    assert true_positive_rate(torch.tensor([989.0, 990.0, 2000.0]), others) == pytest.approx(2 / 3, abs=0.34)
    assert true_positive_rate(torch.full((5,), 2000.0), others) == 1
    assert true_positive_rate(torch.full((5,), 7.0), torch.full((100,), 7.0)) == 0  # ties show nothing


def test_few_of_either_kind_leave_a_wide_interval() -> None:
    many, few = torch.full((300,), 2.0), torch.full((6,), 1.0)
    for members, others, low in ((many, few, 0.5), (many, many - 1, 0.99), (few + 2, many, 0.5)):
        found = membership_interval(membership_auc, members, others)
        assert (found.value, found.low, found.high) == (1, pytest.approx(low), 1)


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 members"):
        membership_auc(torch.tensor([]), torch.tensor([1.0]))
    with pytest.raises(ConfigError, match="at least 100"):
        true_positive_rate(torch.ones(5), torch.ones(99))
    with pytest.raises(ConfigError, match="makes no sense"):
        true_positive_rate(torch.ones(5), torch.ones(99), at=2)
