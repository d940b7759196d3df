"""Sequences of a recording: which call has which text, with decoys too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.privacy.attacked import tiny_model

from isthmus.common.errors import DataError
from isthmus.edge.data.batches import Encoded
from isthmus.edge.data.readers import Example
from isthmus.experiments.leak.leak_texts import Text
from isthmus.experiments.leak.rows.recorded_rows import in_order, labels_of, sequences, traffic_of
from isthmus.privacy.attacks.front import Front
from isthmus.privacy.recording.traffic import Backward, Forward, Traffic


def text(*tokens: int) -> Text:
    return Text(Example("", ""), Encoded(tokens, (-100, -100, *tokens[2:])))


TEXTS = [text(5, 6, 7, 8), text(9, 10, 11), text(12, 13, 14, 15)]


@pytest.fixture(scope="module")
def front() -> Front:
    return Front(tiny_model("llama"), 2)


def call(front: Front, number: int, *rows: Text) -> Forward:
    hidden = torch.zeros(len(rows), 4, 32)
    mask = torch.zeros(len(rows), 4, dtype=torch.bool)
    for place, each in enumerate(rows):
        states = front.states(each.tokens)
        hidden[place, : len(states)], mask[place, : len(states)] = states, True
    return Forward(number, 1, hidden, mask, None, "fp32", hidden + 1, True)


def test_sequences_come_in_the_order_of_the_batches_without_padding(front: Front) -> None:
    calls = [call(front, 7, *TEXTS[:2]), call(front, 8, TEXTS[2])]
    backward = Backward(7, 1, torch.arange(2 * 4 * 32).view(2, 4, 32).float(), "fp32", None)
    batches = list(in_order(calls, [TEXTS[:2], TEXTS[2:]], 1))
    found = sequences(batches, front, [backward])
    assert [each.text for each in found] == TEXTS
    for each, own in zip(found, TEXTS, strict=True):
        assert torch.equal(each.forward.hidden[0], front.states(own.tokens))
    assert found[1].backward is not None
    assert torch.equal(found[1].backward.gradient, backward.gradient[1:2, :3])
    assert found[2].backward is None
    traffic = traffic_of(Traffic("", "2:1"), found)
    assert [each.call for each in traffic.backwards] == [traffic.forwards[number].call for number in (0, 1)]


def test_calls_of_single_texts_are_a_batch_too(front: Front) -> None:
    calls = [call(front, number, each) for number, each in enumerate(TEXTS)]
    batches = list(in_order(calls, [TEXTS[:2], TEXTS[2:]], 1))
    assert [len(batch.forwards) for batch in batches] == [2, 1]
    assert [each.text for each in sequences(batches, front)] == TEXTS


def test_of_copies_the_one_is_real_that_has_the_texts_own_states(front: Front) -> None:
    decoys = [text(20, 21, 22, 23), text(24, 25, 26)]
    calls = [call(front, 0, TEXTS[0], decoys[1]), call(front, 1, decoys[0], TEXTS[1])]
    found = sequences(list(in_order(calls, [TEXTS[:2]], 2)), front)
    assert [each.text for each in found] == [TEXTS[0], None, None, TEXTS[1]]


def test_missing_and_further_calls_are_refused(front: Front) -> None:
    calls = [call(front, 0, *TEXTS[:2])]
    with pytest.raises(DataError, match="0 sequences of a batch of 1"):
        sequences(list(in_order(calls, [TEXTS[:2], TEXTS[2:]], 1)), front)
    with pytest.raises(DataError, match="1 calls more"):
        list(in_order([*calls, replace(calls[0], call=1)], [TEXTS[:2]], 1))


def test_labels_are_the_next_tokens_and_a_decoy_has_none() -> None:
    assert labels_of(TEXTS[0], 4).tolist() == [-1, 7, 8, -1]
    assert labels_of(None, 3).tolist() == [-1, -1, -1]
