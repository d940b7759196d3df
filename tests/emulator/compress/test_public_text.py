"""Public text in blocks: what is cut, what is dropped, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.models.tiny import EOS, tiny_tokenizer

from isthmus.common.errors import ConfigError, DataError
from isthmus.emulator.compress.public_text import fingerprint, load_blocks

TOKENIZER = tiny_tokenizer()


def tokens(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def test_text_is_cut_and_the_rest_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "public.txt"
    path.write_text("one line\nand another one\n")
    blocks = load_blocks(path, TOKENIZER, 8)
    assert blocks.dtype == torch.int64
    assert blocks.tolist() == [tokens("one line"), tokens("\nand ano"), tokens("ther one")]


def test_documents_are_parted_by_the_end_of_text(tmp_path: Path) -> None:
    path = tmp_path / "public.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "more": 1}) for text in ("abc", "defg")) + "\n\n")
    assert load_blocks(path, TOKENIZER, 4).tolist() == [[*tokens("abc"), EOS], tokens("defg")]


def test_long_text_comes_whole(tmp_path: Path) -> None:
    path = tmp_path / "public.txt"
    text = "".join(f"line {number}\n" for number in range(30_000))
    path.write_text(text)
    blocks = load_blocks(path, TOKENIZER, 100)
    assert TOKENIZER.decode(blocks.flatten()) == text[: blocks.numel()]
    assert blocks.numel() > len(text) - 100


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"too short", "9 tokens, less than one block of 100"),
        ("a.txt", b"", "0 tokens"),
        ("a.txt", b"\xff\xfe", "not UTF-8 \\(at byte 0\\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', "line 2: no string under the key 'text'"),
        ("a.jsonl", b"[1]\n", "line 1: no string"),
        ("a.jsonl", b'{"text": "x"}\nnope\n', "line 2: not JSON"),
    ],
)
def test_bad_text_is_refused_by_its_place(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        load_blocks(tmp_path / name, TOKENIZER, 100)


def test_a_missing_file_and_a_senseless_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.txt cannot be read"):
        load_blocks(tmp_path / "nothing.txt", TOKENIZER, 100)
    with pytest.raises(ConfigError, match="blocks of 1 tokens"):
        load_blocks(tmp_path / "nothing.txt", TOKENIZER, 1)


def test_the_fingerprint_tells_texts_and_lengths_apart() -> None:
    blocks = torch.arange(12).view(3, 4)
    assert fingerprint(blocks) == fingerprint(blocks.clone())
    others = (blocks.view(4, 3), blocks + 1, blocks[:2])
    assert len({fingerprint(blocks), *map(fingerprint, others)}) == 4
