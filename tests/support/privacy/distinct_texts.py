"""A task whose texts say nothing of each other, and a model that has learned their form."""

from __future__ import annotations

import random
import string
from pathlib import Path

import torch
from support.models.tiny import tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from isthmus.experiments.leak.weights.task_texts import distinct_texts, tokens_of


def distinct_task(folder: Path, n: int) -> Path:
    """An E2E of `n` texts in all: random letters for prompts and completions, one prompt said twice."""
    source = random.Random(0)  # noqa: S311  # texts, no secrets
    (folder / "e2e").mkdir(parents=True)

    def word() -> str:
        return "".join(source.choices(string.ascii_lowercase, k=8))

    rows = [f"{word()},{word()}" for _ in range(n)]
    rows.append(f"{rows[0].partition(',')[0]},again")
    half = n // 2
    for part, own in (("train", rows[:half]), ("test", rows[half:])):
        (folder / "e2e" / f"{part}.csv").write_text("\n".join(["mr,ref", *own]) + "\n", encoding="utf-8")
    return folder


def learned_checkpoint(folder: Path, data: Path, steps: int = 40) -> Path:
    """A tiny Llama of four layers that has been trained on such texts as a whole."""
    path = tiny_checkpoint("llama", folder, num_hidden_layers=4, initializer_range=0.1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    texts = [tokens_of(text)[:24] for text in distinct_texts("e2e", data, tokenizer, 16)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.stack(texts)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    return path
