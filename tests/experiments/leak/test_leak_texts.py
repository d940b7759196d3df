"""The texts of a ledger: no text is in two places, and each attacked one has its secret."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models.tiny import tiny_tokenizer
from support.privacy.small_leak import letters

from isthmus.common.errors import DataError
from isthmus.experiments.leak.leak_texts import Counts, check_disjoint, load_texts
from isthmus.experiments.leak.planted import planted

COUNTS = Counts(train=10, sent=6, public=20, scored=8, max_length=80)


@pytest.mark.parametrize("task", ["e2e", "sst2"])
def test_no_text_is_in_two_places_and_each_sent_one_has_a_secret(task: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    texts = load_texts(task, letters(tmp_path), tokenizer, COUNTS, 0)
    parts = (texts.train, texts.sent, texts.public, texts.scored)
    assert [len(part) for part in parts] == [10, 6, 20, 8]
    everything = [text.encoded.input_ids for part in parts for text in part]
    assert len(set(everything)) == len(everything)
    for text in texts.sent:
        assert text.secret is not None
        assert text.secret in tokenizer.decode(text.encoded.input_ids)
        assert (text.secret in text.example.completion) == (task == "e2e")
    assert sum(text.secret is not None for text in texts.public) == 5
    assert not {text.secret for text in texts.sent} & {text.secret for text in texts.public}
    assert all(text.secret is None for text in (*texts.train, *texts.scored))
    assert texts == load_texts(task, tmp_path, tokenizer, COUNTS, 0)
    assert texts != load_texts(task, tmp_path, tokenizer, COUNTS, 1)


def test_too_few_short_texts_are_refused(tmp_path: Path) -> None:
    counts = Counts(train=10, sent=6, public=20, scored=8, max_length=30)
    says = r"e2e has 0 private texts that are short enough, and 16 are asked for: ask for fewer, or give --max-length "
    with pytest.raises(DataError, match=f"{says}[0-9]+$") as refused:
        load_texts("e2e", letters(tmp_path), tiny_tokenizer(), counts, 0)
    enough = int(str(refused.value).rpartition(" ")[2])
    with pytest.raises(DataError, match=r"private .* --max-length"):
        load_texts("e2e", tmp_path, tiny_tokenizer(), replace(counts, max_length=enough - 1), 0)
    load_texts("e2e", tmp_path, tiny_tokenizer(), replace(counts, max_length=enough), 0)
    with pytest.raises(DataError, match=r"1000 are asked for: ask for fewer$"):
        load_texts("e2e", tmp_path, tiny_tokenizer(), replace(counts, train=994), 0)


def test_an_overlap_of_attacked_and_public_texts_fails() -> None:
    attacked = [torch.tensor([1, 2]), torch.tensor([3, 4])]
    check_disjoint(attacked, [torch.tensor([1, 2, 3])])
    with pytest.raises(DataError, match="1 of 2 attacked texts"):
        check_disjoint(attacked, [torch.tensor([3, 4]), torch.tensor([5])])


def test_secrets_take_turns_and_depend_on_the_seed() -> None:
    first = [planted(number, 0) for number in range(6)]
    assert [words.split()[0] for words, _ in first] == ["Ask", "Call", "Key"] * 2
    assert all(secret in words for words, secret in first)
    assert first == [planted(number, 0) for number in range(6)]
    assert len({*first, *(planted(number, 1) for number in range(6))}) == 12
