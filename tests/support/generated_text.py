"""Texts that are generated in tests: short, greedy, with the logits that each token was chosen by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.models.tiny import VOCAB
from torch import Tensor
from transformers import AutoModelForCausalLM

NEW = 12


def whole(model: Path) -> Any:
    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    for parameter in found.parameters():
        parameter.data = parameter.data.clone()
    return found


def prompt(length: int = 10, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


class Each:
    """A streamer that does something at every token."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act

    def put(self, _tokens: Tensor) -> None:
        self._act()

    def end(self) -> None:
        pass


def text(model: Any, ids: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens, and the logits that they were chosen by."""
    ids = prompt() if ids is None else ids
    given = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(5)
    found = model.generate(ids, **{**given, **options}, output_logits=True, return_dict_in_generate=True)
    return found.sequences, torch.stack(found.logits)


def assert_equal(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
