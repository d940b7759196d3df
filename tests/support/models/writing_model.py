"""A tiny model that writes letters: what it generates is text that has the same tokens again."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from support.models.tiny import tiny_checkpoint, tiny_tokenizer
from transformers import AutoModelForCausalLM

LONGEST = 512


def writing_checkpoint(family: str, folder: Path) -> Path:
    """Write a random model of `family` to `folder` whose likeliest tokens are letters, and return `folder`."""
    tiny_checkpoint(family, folder, max_position_embeddings=LONGEST)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    letters = tiny_tokenizer().convert_tokens_to_ids(list(string.ascii_letters))
    others = [token for token in range(model.config.vocab_size) if token not in letters]
    with torch.no_grad():
        model.lm_head.weight[others] = 0  # a letter's logit is above 0
    model.save_pretrained(folder)
    return folder
