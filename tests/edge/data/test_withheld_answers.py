"""Answers that are learned and not sent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models.tiny import EOS, tiny_tokenizer
from support.privacy.attacked import tiny_model
from torch import Tensor

from isthmus.common.errors import DataError
from isthmus.edge.config.client_config import EvalConfig
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.data.batches import IGNORED, Encoded, collate, encode_for, pad_id
from isthmus.edge.data.readers import Example

ROWS = [Example("ab: ", "x"), Example("cdefg: ", "y"), Example("h: ", "z")]


def encoded(
    examples: list[Example], command: type[TrainConfig | EvalConfig] = TrainConfig, **values: Any
) -> list[Encoded]:
    config = command.model_validate({"cloud": "isthmus://h:1#SHA256:x", "data": "-", **values})
    return encode_for(config, examples, tiny_tokenizer())[0]


def test_another_token_stands_where_the_answer_was_and_the_label_stays() -> None:
    sent, plain = encoded(ROWS, withhold_answers=True), encoded(ROWS)
    assert encoded(ROWS, EvalConfig, withhold_answers=True) == sent
    for ours, theirs in zip(sent, plain, strict=True):
        (answer,) = (label for label in theirs.labels if label not in (IGNORED, EOS))
        assert answer not in ours.input_ids
        assert ours.input_ids == (*theirs.input_ids[:-2], pad_id(tiny_tokenizer()))
        assert ours.labels == theirs.labels[:-1]
        assert ours.labels[-1] == answer


def passed(rows: list[Encoded]) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of a batch."""
    model = tiny_model("llama")
    loss = model(**collate(rows, 0), use_cache=False).loss
    return loss, list(torch.autograd.grad(loss, [*model.model.layers.parameters(), model.model.norm.weight]))


def test_loss_and_gradients_keep_their_bits() -> None:
    sent = encoded(ROWS, withhold_answers=True)
    told = [replace(row, input_ids=(*row.input_ids[:-1], row.labels[-1])) for row in sent]
    assert told != sent
    (loss, gradients), (told_loss, told_gradients) = passed(sent), passed(told)
    assert torch.equal(loss, told_loss)
    assert all(torch.equal(*pair) for pair in zip(gradients, told_gradients, strict=True))
    # The control: another token one place before is noticed.
    changed = [replace(row, input_ids=(*row.input_ids[:-2], 7, row.input_ids[-1])) for row in sent]
    assert not torch.equal(loss, passed(changed)[0])


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (Example("ab: ", "xy", where="d.jsonl:2"), "d.jsonl:2: .* this one has 2, or something"),
        (Example("", "abc", where="d.jsonl:2"), "d.jsonl:2: .* this one has 2, or something"),
    ],
)
def test_an_answer_of_several_tokens_is_refused(example: Example, said: str) -> None:
    with pytest.raises(DataError, match=said):
        encoded([ROWS[0], example], withhold_answers=True)
    assert encoded([ROWS[0], example])
