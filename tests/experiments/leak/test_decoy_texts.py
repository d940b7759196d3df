"""Decoys: as many as are wanted, long enough, and none of them a private text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.models.tiny import tiny_tokenizer
from support.privacy.attacked import tiny_model
from support.privacy.small_leak import letters

from isthmus.common.errors import DataError
from isthmus.edge.data.batches import encode
from isthmus.edge.data.readers import Example
from isthmus.experiments.leak import decoy_texts
from isthmus.experiments.leak.decoy_texts import write_decoys
from isthmus.experiments.leak.leak_texts import Counts, load_texts
from isthmus.privacy.defences.decoys import Decoys
from isthmus.privacy.defences.secret_noise import SecretNoise


def test_there_are_enough_decoys_and_none_is_a_private_text(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    texts = load_texts("e2e", letters(tmp_path), tokenizer, Counts(6, 4, 20, 4, 80), 0)
    real = (*texts.train, *texts.sent)
    written = write_decoys(tiny_model("llama"), tokenizer, "e2e", real, texts.public, 2, 0)
    assert len(written) >= 2 * len(real)
    encoded, dropped = encode(written, tokenizer, 1000)
    assert not dropped
    ids = [text.encoded.input_ids for text in real]
    assert not {each.input_ids for each in encoded} & set(ids)
    generated = [(each.input_ids, each.labels) for each in encoded]
    Decoys(2, ids, generated, SecretNoise(bytes(32)))  # refuses too few, and too short ones


def test_no_decoy_is_cut_to_a_prompt_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The edge cuts a decoy to its row's length, and takes none that then has nothing to learn."""
    monkeypatch.setattr(decoy_texts, "_ROUNDS", 2)
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    texts = load_texts("e2e", letters(tmp_path), tokenizer, Counts(6, 4, 20, 4, 80), 0)
    real = (*texts.train, *texts.sent)
    longest = max(len(text.encoded.input_ids) for text in real)
    long = [replace(text, example=Example("ab " * longest, text.example.completion)) for text in texts.public]
    written = write_decoys(model, tokenizer, "sst2", real, [*long, *texts.public[:2]], 1, 0)
    generated = [(each.input_ids, each.labels) for each in encode(written, tokenizer, 1000)[0]]
    Decoys(1, [text.encoded.input_ids for text in real], generated, SecretNoise(bytes(32)))
    with pytest.raises(DataError, match="no public prompt has fewer"):
        write_decoys(model, tokenizer, "sst2", real, long, 1, 0)
