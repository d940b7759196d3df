"""When a run is limited by its attack's lists, and when real texts are told from decoys."""

from __future__ import annotations

import pytest
import torch
from support.privacy.attacked import tiny_model

from isthmus.common.errors import AttackLimitedError
from isthmus.experiments.leak.attacked_row import check_unlimited
from isthmus.experiments.leak.real_or_decoy import RealOrDecoy
from isthmus.privacy.ledger.judged_attacks import Judged
from isthmus.privacy.measures.bootstrap import Interval


def matching(accuracy: float, recall: float | None) -> Judged:
    return Judged("matching", "known", token_accuracy=Interval(accuracy, 0, 1), coarse_recall=recall)


@pytest.mark.parametrize(("accuracy", "recall"), [(0.95, 0.95), (0.95, 0.975), (0.5, 0.1)])
def test_an_attack_fails_whose_lists_lacked_half_of_what_it_missed(accuracy: float, recall: float) -> None:
    with pytest.raises(AttackLimitedError, match=r"cut 9: matching got .* coarse recall"):
        check_unlimited(matching(accuracy, recall), "cut 9")


@pytest.mark.parametrize(("accuracy", "recall"), [(0.95, 0.98), (0.995, 0.99), (1, 1), (0.3, None)])
def test_an_attack_that_found_all_in_its_lists_does_not(accuracy: float, recall: float | None) -> None:
    check_unlimited(matching(accuracy, recall), "cut 9")


def test_decoys_are_told_by_whoever_has_learned_how_they_are_written() -> None:
    model = tiny_model("llama")
    random = torch.Generator().manual_seed(0)
    start = torch.randint(3, 200, (48, 1), generator=random)
    likely = model.generate(start, do_sample=False, max_new_tokens=10, pad_token_id=0)
    strange = torch.cat([start, torch.randint(3, 200, (48, 10), generator=random)], 1)
    texts, is_real = [*likely[:24], *strange[:24]], torch.arange(48) < 24
    teller = RealOrDecoy(model, list(likely[24:]), list(strange[24:]))
    assert teller.told(texts, is_real).value > 0.95
    alike = RealOrDecoy(model, list(likely[24:36]), list(likely[36:]))  # decoys like real texts teach nothing
    assert alike.told([*likely[:24]], torch.arange(24) < 12).value < 0.8


def test_what_was_not_read_is_not_told() -> None:
    nothing = [torch.full((5,), -1) for _ in range(4)]
    teller = RealOrDecoy(tiny_model("llama"), [torch.tensor([3, 4, 5])] * 2, [torch.tensor([9, 9, 9])] * 2)
    assert teller.told(nothing, torch.tensor([True, False] * 2)).value == 0.5
