"""The texts of a file, and the file of their answers.

Both are JSON Lines. An answer's line has the SHA-256 of its prompt, so that a file of answers is gone on with for the
same prompts alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.common.errors import ConfigError, DataError
from isthmus.common.files import disk_errors
from isthmus.edge.data.readers import Record, checked_text, json_lines, read_messages


@dataclass(frozen=True, slots=True)
class BatchText:
    """One text to answer: either `prompt` or `messages` (role, content) is filled.

    Attributes:
        index: Its number in the file, from 0.
        where: Names its line.
        id: What the line has under this key; None for nothing.
    """

    index: int
    where: str
    prompt: str
    messages: tuple[tuple[str, str], ...]
    id: Any

    @property
    def sha256(self) -> str:
        """Of what is to be answered."""
        return hashlib.sha256(json.dumps([self.prompt, self.messages]).encode()).hexdigest()

    def line(self, text: str, tokens: int) -> str:
        """The line of its answer."""
        own = {} if self.id is None else {"id": self.id}
        return json.dumps({"index": self.index, **own, "prompt_sha256": self.sha256, "text": text, "tokens": tokens})


def read_texts(path: Path) -> list[BatchText]:
    """The texts of a file of JSON Lines, each with `prompt` or `messages`.

    Raises:
        DataError: The file cannot be read, is empty, or has a line that is neither; the message names it.
    """
    texts = [_text_of(index, record) for index, record in enumerate(json_lines(str(path)))]
    if not texts:
        raise DataError(f'{path} holds no prompts: write lines such as {{"prompt": "Once upon a time"}}.')
    return texts


def _text_of(index: int, record: Record) -> BatchText:
    values = record.values
    if ("prompt" in values) == ("messages" in values):
        raise DataError(
            f"{record.where}: it needs 'prompt' (text) or 'messages' (a chat), one of the two; it has "
            f"{', '.join(map(repr, values)) or 'no keys at all'}."
        )
    if "messages" in values:
        return BatchText(index, record.where, "", read_messages(record, "messages"), values.get("id"))
    prompt = checked_text(values["prompt"], f"{record.where}: 'prompt'")
    if not prompt:
        raise DataError(f"{record.where}: the prompt is empty; fill or remove the line.")
    return BatchText(index, record.where, prompt, (), values.get("id"))


@dataclass(frozen=True, slots=True)
class Answers:
    """A file of answers.

    Attributes:
        path: Where it is, or is to be.
        done: How many texts, from the first on, have their answer in it.
        size: Bytes of these lines; what follows is half a line.
    """

    path: Path
    done: int
    size: int

    @classmethod
    def find(cls, path: Path, texts: Sequence[BatchText]) -> Answers:
        """What is there already.

        Raises:
            ConfigError: The file holds something else than answers to these texts.
            DiskError: It cannot be read.
        """
        with disk_errors(path):
            data = path.read_bytes() if path.exists() else b""
        *lines, rest = data.split(b"\n")
        for number, line in enumerate(lines):
            if number >= len(texts) or not _answers(line, texts[number]):
                raise _other_prompts(path, number)
        begun = f'{{"index": {len(lines)}, '.encode()
        if rest and not (begun.startswith(rest) or rest.startswith(begun)):
            raise _other_prompts(path, len(lines))
        return cls(path, len(lines), len(data) - len(rest))

    def begin(self) -> None:
        """Make the file where there is none, and remove half a line.

        Raises:
            DiskError: It cannot be written.
        """
        with disk_errors(self.path), self.path.open("ab") as file:
            file.truncate(self.size)

    def append(self, line: str) -> None:
        """Write the next answer.

        Raises:
            DiskError: It cannot be written.
        """
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _answers(line: bytes, text: BatchText) -> bool:
    try:
        values = json.loads(line)
    except ValueError:
        return False
    return isinstance(values, dict) and (values.get("index"), values.get("prompt_sha256")) == (text.index, text.sha256)


def _other_prompts(path: Path, number: int) -> ConfigError:
    return ConfigError(
        f"{path}, line {number + 1}, is no answer to prompt {number + 1} of this --batch: give another --out, or the "
        "file of prompts that it was made with"
    )
