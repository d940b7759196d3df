"""Token accuracy, secrets, ROUGE-L and their intervals."""

from __future__ import annotations

import math

import pytest
import torch
from support.models.tiny import tiny_tokenizer

from isthmus.common.errors import ConfigError
from isthmus.privacy.measures.bootstrap import mean_interval, means_ratio_interval, ratio_interval, share_interval
from isthmus.privacy.measures.planted_secrets import decoded, secret_hits
from isthmus.privacy.measures.rouge import rouge_l
from isthmus.privacy.measures.token_accuracy import Hits, rare_tokens, token_hits

TRUE = [torch.tensor([3, 4, 5, -1]), torch.tensor([3, 3])]
GUESS = [torch.tensor([3, 9, 5, -1]), torch.tensor([-1, 3])]


def test_padding_does_not_count_and_no_guess_is_wrong() -> None:
    hits = token_hits(GUESS, TRUE)
    assert (hits.right.tolist(), hits.of.tolist()) == ([2, 1], [3, 2])
    assert hits.share == pytest.approx(3 / 5)
    with pytest.raises(ConfigError, match="does not fit"):
        token_hits(GUESS[:1], TRUE)


def test_rare_tokens_are_those_below_a_share_of_public_text() -> None:
    rare = rare_tokens([torch.tensor([3] * 9 + [4])], 6, below=0.2)
    assert rare.tolist() == [True, True, True, False, True, True]
    hits = token_hits(GUESS, TRUE, rare=rare)
    assert (hits.right.tolist(), hits.of.tolist()) == ([1, 0], [2, 0])
    assert math.isnan(token_hits(GUESS[1:], TRUE[1:], rare=rare).share)
    for public, below in (([], 0.1), ([torch.tensor([3])], 0.0)):
        with pytest.raises(ConfigError, match="share"):
            rare_tokens(public, 6, below=below)


def test_a_secret_counts_letter_by_letter_in_its_own_text() -> None:
    hits = secret_hits(["the key is AB-12", "AB-1"], [["AB-12", "xyz"], ["AB-12"]])
    assert (hits.right.tolist(), hits.of.tolist()) == ([1, 0], [2, 1])
    with pytest.raises(ConfigError, match="2 guesses"):
        secret_hits(["a", "b"], [["a"]])
    with pytest.raises(ConfigError, match="empty"):
        secret_hits(["a"], [[""]])


def test_a_gap_in_a_guess_is_no_part_of_a_secret() -> None:
    tokenizer = tiny_tokenizer()
    tokens = torch.tensor(tokenizer("AB-12")["input_ids"])
    assert decoded(tokenizer, tokens) == "AB-12"
    tokens[2] = -1
    assert decoded(tokenizer, tokens) == "AB\N{REPLACEMENT CHARACTER}12"
    assert decoded(tokenizer, torch.cat([tokens[:2], torch.tensor([-1]), tokens[3:]])) != "AB12"


@pytest.mark.parametrize(
    ("guess", "text", "value"),
    [
        ("the cat sat", "The cat sat.", 1.0),
        ("cat the sat", "the cat sat", 2 / 3),
        ("the cat", "the big cat sat", 2 * 2 / 6),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
    ],
)
def test_rouge_l(guess: str, text: str, value: float) -> None:
    assert rouge_l(guess, text) == pytest.approx(value)


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        of = torch.full((40,), 10.0)
        right = torch.bernoulli(torch.full((40, 10), 0.7), generator=random).sum(1)
        interval = share_interval(Hits(right, of), seed=trial)
        covered += interval.low <= 0.7 <= interval.high
    assert 180 <= covered <= 199


def test_an_interval_follows_its_seed_and_never_claims_certainty() -> None:
    hits = Hits(torch.tensor([3.0, 9, 5]), torch.tensor([10.0, 10, 0]))
    assert share_interval(hits) == share_interval(hits)
    perfect = share_interval(Hits(torch.full((10,), 7.0), torch.full((10,), 7.0)))
    assert perfect == (1.0, pytest.approx(0.7), 1.0)
    none = share_interval(Hits(torch.zeros(10), torch.full((10,), 7.0)))
    assert none == (0.0, 0.0, pytest.approx(0.3))
    with pytest.raises(ConfigError, match="share of nothing"):
        share_interval(Hits(torch.zeros(2), torch.zeros(2)))


def test_the_interval_of_a_mean() -> None:
    value, low, high = mean_interval(torch.arange(100.0))
    assert (value, round(low / 10), round(high / 10)) == (49.5, 4, 6)
    with pytest.raises(ConfigError, match="no values"):
        mean_interval(torch.tensor([]))


def test_a_ratio_is_redrawn_with_both_on_the_same_sequences() -> None:
    base = Hits(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([1.0, 1.0, 1.0]))
    twice = Hits(2 * base.right, base.of)
    assert ratio_interval(twice, base) == pytest.approx((2, 2, 2))
    other = Hits(torch.tensor([9.0, 5.0, 1.0]), base.of)
    found = ratio_interval(other, base)
    assert found.value == 1
    assert found.low < 0.5
    assert found.high > 2
    for wrong in (Hits(base.right[:2], base.of[:2]), Hits(0 * base.right, base.of)):
        with pytest.raises(ConfigError, match="cannot be compared"):
            ratio_interval(twice, wrong)


def test_a_ratio_of_means_redraws_as_many_together_and_others_apart() -> None:
    seconds = torch.tensor([1.0, 5.0, 9.0, 2.0])
    assert means_ratio_interval(2 * seconds, seconds) == pytest.approx((2, 2, 2))
    longer = means_ratio_interval(torch.cat([2 * seconds] * 4), seconds)
    assert longer.value == pytest.approx(2)
    assert longer.low < 1.5
    assert longer.high > 2.5
    for wrong in (torch.tensor([]), torch.zeros(3)):
        with pytest.raises(ConfigError, match="have no ratio"):
            means_ratio_interval(seconds, wrong)
