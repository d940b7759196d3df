"""Attacks that are run and judged in one place."""

from __future__ import annotations

import pytest
from support.privacy.attacked import attacked

from isthmus.common.errors import ConfigError
from isthmus.privacy.ledger.judged_attacks import Judged, Truth, attack_labels, attack_tokens, worst
from isthmus.privacy.measures.bootstrap import Interval
from isthmus.privacy.measures.planted_secrets import decoded

FAST = ("nearest_neighbour", "vocabulary_matching")


def test_matching_reads_what_an_undefended_edge_sends_and_nothing_of_other_texts() -> None:
    world = attacked()
    secrets = tuple((decoded(world.knowledge.tokenizer, text[2:6]),) for text in world.texts)
    truth = Truth(world.texts, secrets=secrets)
    nearest, matching = attack_tokens(world.knowledge, world.traffic, truth, FAST)
    assert (nearest.attack, matching.attack) == FAST
    assert matching.token_accuracy is not None
    assert matching.token_accuracy.value == 1
    assert matching.secret_recall is not None
    assert matching.secret_recall.value == 1
    assert matching.rouge_l is not None
    assert matching.rouge_l.value == 1
    assert matching.front == "known"
    assert matching.coarse_recall == 1
    assert worst([nearest, matching], "token_accuracy") == matching.token_accuracy.high

    others = tuple(text.roll(1) for text in world.texts)
    (wrong,) = attack_tokens(world.knowledge, world.traffic, Truth(others), ["vocabulary_matching"])
    assert wrong.token_accuracy is not None
    assert wrong.token_accuracy.value < 0.5
    assert wrong.secret_recall is None


def test_without_gradients_there_is_no_label_to_find() -> None:
    world = attacked()
    assert attack_labels(world.knowledge, world.traffic, Truth(world.texts)) == []
    assert worst([], "label_accuracy") == 0


def test_the_worst_is_the_largest_upper_bound() -> None:
    judged = [Judged(name, "known", label_accuracy=Interval(0.5, 0.4, high)) for name, high in (("a", 0.6), ("b", 0.7))]
    assert worst([*judged, Judged("c", "known")], "label_accuracy") == 0.7


def test_a_truth_of_another_shape_is_refused() -> None:
    world = attacked()
    with pytest.raises(ConfigError, match="does not fit"):
        attack_tokens(world.knowledge, world.traffic, Truth(world.texts[1:]), FAST[:1])
