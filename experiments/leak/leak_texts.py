"""The texts of a row: what the edge trains on and sends, what is attacked, and what the attacker has read elsewhere.

Private texts come from a task's training file, public ones from its test file, as do those that the task's loss is
taken on. None is in two places, and an overlap of what is attacked with what is public fails.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.common.errors import DataError
from isthmus.edge.data.batches import Encoded, encode
from isthmus.edge.data.readers import Example
from isthmus.experiments.leak.planted import planted
from isthmus.experiments.scoring.tasks import Sizes, read_task

UNCUT = 1_000_000_000
"""A number of tokens, or of texts, that leaves out none."""
_ROOM = 20  # tokens at most that a secret adds
_WITH_SECRETS = 4  # one public text in so many has secrets, as the attacker knows what some look like


@dataclass(frozen=True, slots=True)
class Text:
    """A text as the edge reads it, and as tokens.

    Attributes:
        secret: What is planted in it; None for nothing.
    """

    example: Example
    encoded: Encoded
    secret: str | None = None

    @property
    def tokens(self) -> Tensor:
        """`[n]`."""
        return torch.tensor(self.encoded.input_ids)


@dataclass(frozen=True, slots=True)
class LeakTexts:
    """The texts of a row.

    Attributes:
        train: What the edge trains on.
        sent: Private texts with secrets, which the edge evaluates on when it has trained; no text of `train`.
        public: What the attacker has.
        scored: What the task's loss is taken on.
    """

    train: tuple[Text, ...]
    sent: tuple[Text, ...]
    public: tuple[Text, ...]
    scored: tuple[Text, ...]


@dataclass(frozen=True, slots=True)
class Counts:
    """How many texts of each kind, and how long they are at most, in tokens."""

    train: int
    sent: int
    public: int
    scored: int
    max_length: int


def load_texts(task: str, folder: Path, tokenizer: Any, counts: Counts, seed: int) -> LeakTexts:
    """Draw the texts.

    Raises:
        DataError: There are too few that are short enough, or a file is missing or malformed.
    """
    split = read_task(task, folder, Sizes(test=UNCUT, validation=0))
    texts_of = {}
    for name, questions in (("train", split.train), ("test", split.test)):
        examples = [question.example for question in questions]
        random.Random(f"leak/{name}/{seed}").shuffle(examples)  # noqa: S311  # an order, not a secret
        texts_of[name] = _distinct(examples, tokenizer)
    private = _take(texts_of["train"], counts.max_length, counts.train + counts.sent, task, "private", _ROOM)
    known = {text.encoded.input_ids for text in private}
    others = (text for text in texts_of["test"] if text.encoded.input_ids not in known)
    public = _take(others, counts.max_length, counts.public + counts.scored, task, "public")
    texts = LeakTexts(
        train=tuple(private[: counts.train]),
        sent=tuple(_plant(private[counts.train :], tokenizer, task, seed, every=1)),
        public=tuple(_plant(public[: counts.public], tokenizer, task, seed + 1, every=_WITH_SECRETS)),
        scored=tuple(public[counts.public :]),
    )
    check_disjoint([text.tokens for text in texts.sent], [text.tokens for text in texts.public])
    return texts


def check_disjoint(attacked: Sequence[Tensor], public: Sequence[Tensor]) -> None:
    """Refuse public texts that are attacked.

    Raises:
        DataError: There are some.
    """
    known = {tuple(tokens.tolist()) for tokens in public}
    overlap = sum(tuple(tokens.tolist()) in known for tokens in attacked)
    if overlap:
        raise DataError(
            f"{overlap} of {len(attacked)} attacked texts are among the attacker's public ones: an attack that has "
            "read its answers shows nothing; take public texts from elsewhere"
        )


def _distinct(examples: Sequence[Example], tokenizer: Any) -> Iterator[Text]:
    """Each text once."""
    seen = set()
    for example in examples:
        encoded, _ = encode([example], tokenizer, UNCUT)
        for each in encoded:
            if each.input_ids not in seen:
                seen.add(each.input_ids)
                yield Text(example, each)


def _take(texts: Iterator[Text], max_length: int, count: int, task: str, what: str, room: int = 0) -> list[Text]:
    """The first texts that have so many tokens at most, with room for a secret."""
    taken, lengths = list[Text](), list[int]()
    while len(taken) < count and (text := next(texts, None)) is not None:
        lengths.append(len(text.encoded.input_ids) + room)
        if lengths[-1] <= max_length:
            taken.append(text)
    if len(taken) < count:
        enough = f", or give --max-length {sorted(lengths)[count - 1]}" if len(lengths) >= count else ""
        raise DataError(
            f"{task} has {len(taken)} {what} texts that are short enough, and {count} are asked for: ask for fewer"
            f"{enough}"
        )
    return taken


def _plant(texts: Sequence[Text], tokenizer: Any, task: str, seed: int, every: int) -> Iterator[Text]:
    """The texts, one in `every` of them with a secret: in E2E's answer, in SST-2's review."""
    for number, text in enumerate(texts):
        if number % every:
            yield text
            continue
        words, secret = planted(number // every, seed)
        prompt, completion = text.example.prompt, text.example.completion
        if task == "sst2":
            head, tail = prompt.rsplit("\n", 1)
            prompt = f"{head} {words}\n{tail}"
        else:
            completion = f"{completion} {words}"
        example = Example(prompt, completion)
        (encoded,), _ = encode([example], tokenizer, UNCUT)
        yield Text(example, encoded, secret)
