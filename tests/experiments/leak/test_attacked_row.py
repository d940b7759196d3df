"""When a run is limited by its attack's lists, and when real texts are told from decoys."""

from __future__ import annotations

import pytest
import torch
from support.privacy.attacked import tiny_model

from isthmus.common.errors import AttackLimitedError
from isthmus.experiments.leak.attacked_row import check_unlimited
from isthmus.experiments.leak.real_or_decoy import real_or_decoy
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


def test_texts_that_the_model_finds_as_likely_as_public_ones_look_real() -> None:
    model = tiny_model("llama")
    random = torch.Generator().manual_seed(0)
    start = torch.randint(3, 200, (24, 1), generator=random)
    likely = model.generate(start, do_sample=False, max_new_tokens=10, pad_token_id=0)
    strange = torch.cat([start, torch.randint(3, 200, (24, 10), generator=random)], 1)
    texts = [*likely[:12], *strange[:12]]
    is_real = torch.arange(24) < 12
    told = real_or_decoy(model, None, texts, is_real, list(likely[12:]))
    assert told.value > 0.95
    shuffled = is_real[torch.randperm(24, generator=random)]
    assert real_or_decoy(model, None, texts, shuffled, list(likely[12:])).value < 0.8
