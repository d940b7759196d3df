"""Decoys: as many as are wanted, long enough, and none of them a private text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from support.models.tiny import tiny_tokenizer
from support.privacy.attacked import tiny_model
from support.privacy.small_leak import letters

from isthmus.edge.data.batches import encode
from isthmus.edge.data.readers import Example
from isthmus.experiments.leak import decoy_texts
from isthmus.experiments.leak.decoy_texts import write_decoys
from isthmus.experiments.leak.leak_texts import Counts, Text, load_texts
from isthmus.privacy.defences.decoys import Decoys
from isthmus.privacy.defences.secret_noise import SecretNoise


@pytest.mark.long
def test_there_are_enough_decoys_and_none_is_a_private_text(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    texts = load_texts("e2e", letters(tmp_path), tokenizer, Counts(6, 4, 20, 4, 80), 0)
    real = (*texts.train, *texts.sent)
    written = write_decoys(tiny_model("llama"), tokenizer, real, texts.public, 2, 0)
    assert len(written) >= 2 * len(real)
    encoded, dropped = encode(written, tokenizer, 1000)
    assert not dropped
    ids = [text.encoded.input_ids for text in real]
    assert not {each.input_ids for each in encoded} & set(ids)
    generated = [(each.input_ids, each.labels) for each in encoded]
    Decoys(2, ids, generated, SecretNoise(bytes(32)))  # refuses too few, and too short ones


def test_each_prompt_is_there_as_often_and_none_is_all_that_is_left_of_a_decoy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The edge cuts a decoy to its row's length, and takes none that then has nothing to learn."""
    monkeypatch.setattr(decoy_texts, "_ROUNDS", 2)
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    texts = load_texts("e2e", letters(tmp_path), tokenizer, Counts(6, 4, 20, 4, 80), 0)
    real = [*texts.train, *texts.sent]
    longest = max(len(text.encoded.input_ids) for text in real)
    example = Example("ab " * longest, "c")
    (encoded,), _ = encode([example], tokenizer, 1000)
    real.append(Text(example, encoded))  # its prompt is longer than every other text
    written = write_decoys(model, tokenizer, real, texts.public, 2, 0)
    assert Counter(each.prompt for each in written) == Counter(2 * [text.example.prompt for text in real])
    generated = [(each.input_ids, each.labels) for each in encode(written, tokenizer, 1000)[0]]
    decoys = Decoys(2, [text.encoded.input_ids for text in real], generated, SecretNoise(bytes(32)))
    for text in real:
        for tokens, labels in decoys.of(text.encoded.input_ids):
            assert len(tokens) == len(text.encoded.input_ids)
            assert max(labels) >= 0
