"""What a training run has left in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def adapter(out: Path) -> dict[str, Tensor]:
    """What a run has trained."""
    weights: dict[str, Tensor] = load_file(out / "adapter" / "adapter_model.safetensors")
    return weights


def losses(out: Path) -> list[dict[str, Any]]:
    """A run's loss log."""
    return [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether both have the same tensors, bit for bit, and any at all."""
    return bool(ours) and ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Bit for bit the same adapter, and the same loss log: no step lost, none doubled."""
    assert (ours / "losses.jsonl").read_text() == (theirs / "losses.jsonl").read_text()
    assert same(adapter(ours), adapter(theirs))
