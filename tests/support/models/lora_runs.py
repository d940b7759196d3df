"""Short runs of LoRA on the tiny model, split or whole, and whether two are the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from support.models.tiny import VOCAB
from torch import Tensor
from transformers import AutoModelForCausalLM

Run = tuple[list[float], dict[str, Tensor]]
Q_AND_V = ["q_proj", "v_proj"]
EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def whole(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False  # as on the edge
    return model


def lora(targets: Any = Q_AND_V, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False, **options)


def adapted(model: Any, config: peft.PeftConfig | None = None) -> Any:
    torch.manual_seed(3)
    return peft.get_peft_model(model, copy.deepcopy(config) or lora(lora_dropout=0.1))  # PEFT writes into it


def batch(seed: int, rows: int = 2, length: int = 8) -> dict[str, Tensor]:
    """Padded on the left, the padding not trained on."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1:, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def train(model: Any, between: Callable[[], None] = lambda: None, steps: int = 3, accumulate: int = 1) -> Run:
    """Losses of AdamW steps, and the trained parameters after them; `between` comes before each backward."""
    torch.manual_seed(7)
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, foreach=False)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = sum(model(**batch(accumulate * step + n), use_cache=False).loss for n in range(accumulate))
        between()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses, {name: p.detach().clone() for name, p in trained.items()}


def assert_same(mine: Run, theirs: Run) -> None:
    assert mine[0] == theirs[0]
    assert mine[1].keys() == theirs[1].keys()
    assert not [name for name, value in mine[1].items() if not torch.equal(value, theirs[1][name])]
