"""Texts of a task to be members, non-members and public texts: one for each prompt, so that none tells of another."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.common.errors import DataError
from isthmus.edge.data.batches import Encoded, encode
from isthmus.experiments.scoring.tasks import Sizes, default_data_folder, read_task

_ALL = 1_000_000_000


def distinct_texts(
    task: str, folder: Path | None, tokenizer: Any, count: int, *, max_length: int = 256, seed: int = 0
) -> list[Encoded]:
    """Texts of both files of a task in a drawn order, so that any part of them is a sample of the same distribution.

    Args:
        task: `e2e` or another name of `isthmus.experiments.scoring.tasks`.
        folder: Where the tasks lie; None for shared/data beside the checkout.
        count: How many.
        seed: Of the order.

    Raises:
        DataError: There are fewer, or a file is missing or malformed.
        ConfigError: There is no such task.
    """
    split = read_task(task, folder or default_data_folder(), Sizes(test=_ALL, validation=0))
    by_prompt = {question.prompt: question.example for question in reversed((*split.train, *split.test))}
    texts, _ = encode(list(by_prompt.values()), tokenizer, max_length)
    if count > len(texts):
        raise DataError(f"{task} has {len(texts)} texts with prompts of their own, and {count} are asked for: ask less")
    random.Random(f"texts/{seed}").shuffle(texts)  # noqa: S311  # an order, not a secret
    return texts[:count]


def tokens_of(text: Encoded) -> Tensor:
    """The tokens of a text, `[n]`."""
    return torch.tensor(text.input_ids)
