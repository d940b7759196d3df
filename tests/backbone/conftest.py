"""Fixtures of the backbone's tests: tiny checkpoints, made once in a run, and the two ways to run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models.tiny import VOCAB, tiny_checkpoint
from torch import nn
from transformers import AutoModelForCausalLM

from isthmus.backbone.families import family_of
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.backbone.split.span import FrozenSpan, load_span


@dataclass(frozen=True)
class Pair:
    """One model twice: whole, by transformers alone, and cut, with the span in the same process."""

    whole: Any
    edge: Any
    span: FrozenSpan
    folder: Path
    plan: SplitPlan


Checkpoints = Callable[..., Path]
Pairs = Callable[..., Pair]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    made: dict[tuple[Any, ...], Path] = {}

    def get(family: str, **overrides: Any) -> Path:
        key = (family, *sorted(overrides.items()))
        if key not in made:
            made[key] = tiny_checkpoint(family, tmp_path_factory.mktemp(family) / "model", **overrides)
        return made[key]

    return get


def whole_model(folder: Path) -> Any:
    from transformers import AutoConfig

    attention = family_of(AutoConfig.from_pretrained(folder)).attentions[0]
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)


@pytest.fixture
def pairs(checkpoints: Checkpoints) -> Pairs:
    return make_pairs(checkpoints)


def make_pairs(checkpoints: Checkpoints) -> Pairs:
    def get(family: str, plan: str = "2:2", **overrides: Any) -> Pair:
        folder = checkpoints(family, **overrides)
        whole = whole_model(folder)
        cut = SplitPlan.parse(plan, whole.config.num_hidden_layers)
        span = load_span(folder, cut)
        return Pair(whole, load_edge_parts(folder, cut, span), span, folder, cut)

    return get


def batch(kind: str, *, length: int = 24, rows: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of random tokens. Padding is masked; labels ignore it."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "single_token":
        length, rows = 1, 2
    if kind in {"one_row", "packed"}:
        rows = 1
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    result = {"input_ids": ids, "labels": ids.clone()}
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        padded = min(5 * row, length - 1)
        if kind == "right_padded" and padded:
            mask[row, -padded:] = 0
        elif kind == "left_padded" and padded:
            mask[row, :padded] = 0
    if kind in {"right_padded", "left_padded", "full_mask"}:
        result["attention_mask"] = mask
        result["labels"][mask == 0] = -100
    if kind == "positions":
        result["position_ids"] = (torch.arange(length) + 7).expand(rows, -1).contiguous()
    if kind == "packed":
        first = length // 3
        restart = torch.cat([torch.arange(first), torch.arange(length - first)])
        result["position_ids"] = restart.unsqueeze(0)
    return result


def disturb(module: nn.Module) -> None:
    """Move what is trainable off its start, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def logits(model: Any, kind: str = "full_mask") -> torch.Tensor:
    result: torch.Tensor = model(**batch(kind), use_cache=False).logits
    return result.detach()


KINDS = ("no_mask", "full_mask", "right_padded", "left_padded", "positions", "packed", "single_token", "one_row")
