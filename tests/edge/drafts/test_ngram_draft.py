"""What an n-gram draft copies, and how sure it is."""

from __future__ import annotations

import pytest

from isthmus.edge.drafts.candidates import Choose
from isthmus.edge.drafts.ngram_draft import LONGEST_NGRAM, NgramProposer


def never(_logits: object) -> None:
    raise AssertionError("an n-gram has no logits")


CHOOSE: Choose = never  # type: ignore[assignment]


def drafted(proposer: NgramProposer, text: list[int], length: int) -> list[tuple[int, int]]:
    """Tokens and buckets."""
    proposer.follow(text)
    found = [proposer.propose(CHOOSE) for _ in range(length)]
    return [(each.token, each.bucket) for each in found if each is not None]


def test_what_followed_the_longest_agreement_last() -> None:
    assert drafted(NgramProposer(), [1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 2) == [(9, 2), (2, 3)]
    assert drafted(NgramProposer(), [1, 3, 5, 2, 3, 6, 7, 3], 2) == [(6, 0), (7, 1)]
    assert drafted(NgramProposer(), [1, 2, 3], 2) == []
    assert drafted(NgramProposer(), [1], 2) == []
    assert drafted(NgramProposer(), [], 2) == []


def test_a_text_that_repeats_itself_goes_on() -> None:
    assert [token for token, _ in drafted(NgramProposer(), [1, 2, 1, 2], 5)] == [1, 2, 1, 2, 1]
    buckets = [bucket for _, bucket in drafted(NgramProposer(), [4, 4], 8)]
    assert buckets == [*range(LONGEST_NGRAM), *[LONGEST_NGRAM - 1] * 3]


def test_a_text_that_grows_is_what_it_is_at_once() -> None:
    text = [int(each) for each in "31415926535897932384626433832795028841971693993751058209749445923078164062862089"]
    growing = NgramProposer()
    for length in range(1, len(text)):
        assert drafted(growing, text[:length], 3) == drafted(NgramProposer(), text[:length], 3)


@pytest.mark.parametrize("text", [[1, 2, 3], [7, 8, 7]])
def test_the_bucket_is_known_before(text: list[int]) -> None:
    proposer = NgramProposer()
    proposer.follow(text)
    bucket, token = proposer.next_bucket(), proposer.propose(CHOOSE)
    assert (token is None) == (bucket is None)
    assert token is None or token.bucket == bucket
