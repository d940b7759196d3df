"""Public text in blocks of tokens: what layers are measured on, and what an emulator is distilled with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.common.errors import ConfigError, DataError

# A tokenizer is given whole lines up to about this many characters at once: its time grows faster than the text.
_CHUNK = 1 << 16


def load_blocks(path: Path, tokenizer: Any, length: int, texts: Sequence[str] | None = None) -> Tensor:
    """Cut a text file into blocks of `length` tokens; what is left at the end is dropped.

    A `.jsonl` file holds one document a line, under the key `text`; any other file is one document. Documents follow
    each other without padding, with the tokenizer's end-of-text token in between.

    Args:
        path: UTF-8 text, or JSON lines if it ends in `.jsonl`.
        texts: Those of its documents that count; None for all, which are read here.

    Returns:
        `[n, length]`, int64, n >= 1.

    Raises:
        ConfigError: `length` is less than 2.
        DataError: The file is missing, malformed, or shorter than one block; the message names it.
    """
    if length < 2:
        raise ConfigError(f"blocks of {length} tokens hold nothing to predict; use a length of 2 or more")
    between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    for document in documents(path) if texts is None else texts:
        tokens += between if tokens else []
        for chunk in _chunks(document):
            tokens += tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
    n_blocks = len(tokens) // length
    if not n_blocks:
        raise DataError(
            f"the text {path} has {len(tokens)} tokens, less than one block of {length}; "
            "give more text, or shorter blocks."
        )
    return torch.tensor(tokens[: n_blocks * length], dtype=torch.int64).view(n_blocks, length)


def spread(blocks: Tensor, tokens: int) -> Tensor:
    """Blocks at even distances, as many as hold `tokens` tokens: at least one, at most all."""
    n_used = min(len(blocks), max(1, tokens // blocks.shape[1]))
    return blocks[[i * len(blocks) // n_used for i in range(n_used)]]


def fingerprint(blocks: Tensor) -> str:
    """SHA-256 (hex) of the blocks' tokens and their length."""
    digest = hashlib.sha256(str(tuple(blocks.shape)).encode())
    digest.update(blocks.contiguous().numpy().tobytes())
    return digest.hexdigest()


def documents(path: Path) -> list[str]:
    """The documents of a text file; see `load_blocks`.

    Raises:
        DataError: The file is missing or malformed; the message names it.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"the text {path} cannot be read ({error.strerror}): check the path.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"the text {path} is not UTF-8 (at byte {error.start}); save it as UTF-8.") from error
    return list(_documents(path, text))


def _documents(path: Path, text: str) -> Iterator[str]:
    if path.suffix.lower() != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}); every line is one JSON object.") from error
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise DataError(f'{path}, line {number}: no string under the key \'text\'; write {{"text": "..."}}.')
        yield value["text"]


def _chunks(document: str) -> Iterator[str]:
    chunk: list[str] = []
    size = 0
    for line in document.splitlines(keepends=True):
        chunk.append(line)
        size += len(line)
        if size >= _CHUNK:
            yield "".join(chunk)
            chunk, size = [], 0
    if chunk:
        yield "".join(chunk)
