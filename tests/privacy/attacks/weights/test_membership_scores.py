"""Membership out of a tuned model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models.tiny import VOCAB
from support.privacy.attacked import tiny_model

from isthmus.common.errors import DataError
from isthmus.privacy.attacks.weights.membership_scores import CalibratedMembership, Candidate, LossMembership
from isthmus.privacy.measures.membership import membership_auc

COUNT = 24


def drawn(seed: int) -> list[Candidate]:
    random = torch.Generator().manual_seed(seed)
    easy = torch.arange(12) + 3
    texts = [torch.randint(3, VOCAB, (12,), generator=random) for _ in range(COUNT)]
    # Some are easier than others, whoever trained on them: runs of one token.
    return [Candidate(torch.where(easy < 3 + number % 12, text[0], text), 2) for number, text in enumerate(texts)]


@pytest.fixture(scope="module")
def tuned() -> Any:
    """A tiny model that was trained on the members."""
    model, members = tiny_model("llama"), drawn(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(8):
        ids = torch.stack([each.tokens for each in members])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_members_score_higher_and_a_reference_helps(tuned: Any) -> None:
    members, others = drawn(1), drawn(2)
    plain, calibrated = LossMembership(tuned), CalibratedMembership(tuned, tiny_model("llama"))
    by_loss = membership_auc(plain.scores(members), plain.scores(others))
    by_difference = membership_auc(calibrated.scores(members), calibrated.scores(others))
    assert by_difference > 0.9
    assert by_difference >= by_loss > 0.55


def test_a_model_that_saw_neither_tells_nothing() -> None:
    members, others = drawn(1), drawn(2)
    for attack in (LossMembership(tiny_model("llama")), CalibratedMembership(tiny_model("llama"), tiny_model("llama"))):
        assert abs(membership_auc(attack.scores(members), attack.scores(others)) - 0.5) < 0.2


def test_a_text_without_a_label_is_refused(tuned: Any) -> None:
    with pytest.raises(DataError, match="a text of 3 tokens whose labels begin at 3 has none"):
        LossMembership(tuned).scores([Candidate(torch.tensor([3, 4, 5]), 3)])
