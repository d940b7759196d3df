"""Decoys: as many as are wanted, long enough, and none of them a private text."""

from __future__ import annotations

from pathlib import Path

from support.models.tiny import tiny_tokenizer
from support.privacy.attacked import tiny_model
from support.privacy.small_leak import letters

from isthmus.edge.data.batches import encode
from isthmus.experiments.leak.decoy_texts import write_decoys
from isthmus.experiments.leak.leak_texts import Counts, load_texts
from isthmus.privacy.defences.decoys import Decoys
from isthmus.privacy.defences.secret_noise import SecretNoise


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
