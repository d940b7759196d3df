"""Attacks that are run and judged in one place."""

from __future__ import annotations

import pytest
from support.privacy.attacked import Attacked, attacked

from isthmus.common.errors import ConfigError
from isthmus.privacy.ledger.judged_attacks import TOKEN_ATTACKS, Judged, Truth, guess_of, judge_tokens
from isthmus.privacy.measures.planted_secrets import decoded


def judged(world: Attacked, truth: Truth, name: str = "vocabulary_matching") -> Judged:
    guess = guess_of(TOKEN_ATTACKS[name], world.knowledge, world.traffic)
    return judge_tokens(name, "known", guess, world.knowledge, truth)


def test_matching_reads_what_an_undefended_edge_sends_and_nothing_of_other_texts() -> None:
    world = attacked()
    secrets = tuple((decoded(world.knowledge.tokenizer, text[2:6]),) for text in world.texts)
    matching = judged(world, Truth(world.texts, secrets=secrets))
    assert (matching.attack, matching.front) == ("vocabulary_matching", "known")
    for found in (matching.token_accuracy, matching.secret_recall, matching.rouge_l):
        assert found is not None
        assert found.value == 1
    assert matching.coarse_recall is not None
    assert matching.coarse_recall.value == 1
    assert matching.coarse_recall.low < 1

    wrong = judged(world, Truth(tuple(text.roll(1) for text in world.texts)))
    assert wrong.token_accuracy is not None
    assert wrong.token_accuracy.value < 0.5
    assert wrong.secret_recall is None


def test_a_truth_of_another_shape_is_refused() -> None:
    world = attacked()
    with pytest.raises(ConfigError, match="does not fit"):
        judged(world, Truth(world.texts[1:]), "nearest_neighbour")
