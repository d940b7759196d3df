"""Secret bytes and numbers are found in text in each form that is named, and nothing is found where there are none."""

from __future__ import annotations

import base64
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.experiments.rigs.secrets import memory_scan, text_forms
from isthmus.experiments.rigs.secrets.memory_scan import WINDOW, Scanner, files_below
from isthmus.experiments.rigs.secrets.text_forms import PIECE, RUN, TextScanner, runs_of

KEY = bytes(range(200, 232))
"""A key; what is looked for are its first bytes."""
VALUES = np.random.default_rng(0).standard_normal(2000).astype(np.float32)
FORMS: dict[str, Callable[[bytes], str]] = {
    "hex": bytes.hex,
    "upper-case hex": lambda key: key.hex().upper(),
    "base64": lambda key: base64.b64encode(key).decode(),
    "URL-safe base64": lambda key: base64.urlsafe_b64encode(key).decode(),
    "repr": repr,
    "repr in JSON": lambda key: json.dumps(repr(key)),
    "JSON": lambda key: json.dumps(key.decode("latin-1")),
    "JSON in JSON": lambda key: json.dumps(json.dumps(key.decode("latin-1"))),
    "values": lambda key: json.dumps(list(key)),
    "numpy": lambda key: str(np.frombuffer(key, np.uint8)),
}
PRINTED: dict[str, Callable[[torch.Tensor], str]] = {
    "JSON": lambda values: json.dumps(values.tolist()),
    "repr": lambda values: repr(values.tolist()),
    "numpy": lambda values: str(values.numpy()),
    "torch": str,
    "torch in JSON": lambda values: json.dumps({"event": str(values)}),
    "torch, with exponents": lambda values: str(torch.cat([values, torch.tensor([1e-7, 1e4])])),
    "four digits": lambda values: " ".join(f"{value:.4f}" for value in values.tolist()),
    "CSV": lambda values: ";".join(f"{value:.6e}" for value in values.tolist()),
}


def scanner_for(key: bytes = KEY) -> TextScanner:
    return TextScanner({key[:WINDOW]: "key"})


@pytest.mark.parametrize("form", FORMS)
def test_a_key_in_a_log_is_found_in_each_form(form: str, tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    line = json.dumps({"event": "session", "tenant": "edge"})
    log.write_text(f"{line}\nkey={FORMS[form](KEY)}\n{line}\n")
    assert scanner_for().count(files_below(tmp_path)) == Counter(key=1)
    assert Scanner({KEY[:WINDOW]: "key"}).count(files_below(tmp_path)) == Counter()  # what was looked for before
    assert scanner_for(KEY[::-1]).count(files_below(tmp_path)) == Counter()  # the control: another key
    log.write_text(f"{line}\nkey=\n{line}\n")
    assert scanner_for().count(files_below(tmp_path)) == Counter()


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
@pytest.mark.parametrize("before", range(7))
def test_a_key_is_found_in_base64_wherever_it_begins(before: int, encode: Callable[[bytes], bytes]) -> None:
    for _ in range(50):
        key, around = os.urandom(32), (os.urandom(before), os.urandom(5))
        text = encode(around[0] + key + around[1])
        assert scanner_for(key).count([text]) == Counter(key=1)
        assert scanner_for(key).count([encode(around[0] + os.urandom(32) + around[1])]) == Counter()


@pytest.mark.parametrize("form", FORMS)
def test_random_keys_are_found_with_all_bytes_that_are_escaped(form: str) -> None:
    source = random.Random(0)  # noqa: S311  # no secrets
    for _ in range(300):
        awkward = source.choices(list(b"'\"\\\n\t\r/ \x00\x7f\x80\xff09aZ"), k=32)
        key = bytes(source.sample(awkward, 32) if source.random() < 0.5 else source.randbytes(32))
        assert scanner_for(key).count([FORMS[form](key).encode()])["key"] >= 1


def test_a_name_that_is_the_same_in_several_forms_counts_once() -> None:
    name = b"tenant-0123456789abcdefg"
    assert TextScanner({name: "name"}).count([b'{"tenant": "%b"}' % name]) == Counter(name=1)


def test_a_piece_of_a_key_is_enough_and_less_is_not() -> None:
    text = KEY.hex().encode()
    assert scanner_for().count([text[: 2 * PIECE]]) == Counter(key=1)
    assert scanner_for().count([text[: 2 * PIECE - 1]]) == Counter()


@pytest.mark.parametrize("form", PRINTED)
def test_an_activation_in_a_log_is_found_as_numbers(form: str, tmp_path: Path) -> None:
    (run, *_), values = runs_of(VALUES, 2), torch.from_numpy(VALUES)
    start = VALUES.tolist().index(run[0])
    log, scanner = tmp_path / "worker.log", TextScanner({}, {run: "activations"})
    log.write_text(f"12 34 activations: {PRINTED[form](values[start : start + 60])}\n")
    assert scanner.count(files_below(tmp_path)) == Counter(activations=1)
    log.write_text(f"12 34 activations: {PRINTED[form](values[start + 1 : start + 60])}\n")  # another part of it
    assert scanner.count(files_below(tmp_path)) == Counter()


@pytest.mark.parametrize("printed", [str, lambda values: str(values.numpy())])
def test_a_shortened_print_of_a_tensor_is_found_by_its_first_values(printed: Callable[[torch.Tensor], str]) -> None:
    values = torch.from_numpy(np.random.default_rng(2).uniform(0.1, 2, (1, 4, 576)).astype(np.float32))
    text = printed(values)
    assert "..." in text
    runs = dict.fromkeys(runs_of(values.numpy(), 6), "activations")
    assert TextScanner({}, runs).count([text.encode()])["activations"] >= 1


def test_runs_that_are_found_by_chance_are_not_looked_for() -> None:
    assert list(runs_of(np.zeros(100, np.float32), 6)) == []
    assert list(runs_of(np.tile(np.float32([1, 0.5, 0.25]), 40), 6)) == []
    assert list(runs_of(np.full(100, 0.12345, np.float32), 6)) == []
    runs = list(runs_of(VALUES, 6))
    assert len(runs) == 7
    assert all(len(run) == RUN and min(map(abs, run)) >= 0.1 for run in runs)


def test_nothing_is_found_in_text_without_any() -> None:
    source = np.random.default_rng(1)
    scanner = TextScanner(
        {source.bytes(WINDOW): "key" for _ in range(500)}, dict.fromkeys(runs_of(VALUES, 300), "activations")
    )
    others = source.standard_normal(20_000).astype(np.float32)
    parts = [source.bytes(1 << 16).hex(), base64.b64encode(source.bytes(1 << 16)).decode(), json.dumps(others.tolist())]
    assert scanner.count([Path(text_forms.__file__).read_bytes(), *(part.encode() for part in parts), b""]) == Counter()
    assert scanner.scanned > 1 << 18


@pytest.mark.parametrize("text", [KEY.hex(), json.dumps(VALUES[:RUN].tolist())])
def test_what_lies_over_the_end_of_a_block_is_found(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (memory_scan, text_forms):
        monkeypatch.setattr(module, "BLOCK", 1024)
    scanner = TextScanner({KEY[:WINDOW]: "planted"}, {tuple(VALUES[:RUN].tolist()): "planted"})
    for before in range(1024 - len(text) - 2, 1024 + 2):
        assert scanner.count([b" " * before + text.encode() + b" " * 5000])["planted"] >= 1
