"""What a call takes in memory: the estimate beside what torch allocates, for each family, attention and mask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models.peak_allocations import peak_bytes
from support.models.tiny import CONFIGS, N_LAYERS, tiny_checkpoint, tiny_config

from isthmus.backbone.families import family_of
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.runtime.call_memory import CallMemory, CallShape, Pass, call_memory
from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.split.span import FrozenSpan, SpanInput, load_span
from isthmus.cloud.engine.executor import Executor

MOST = 3.2
"""So many times what torch allocates the estimate is at most; it is never less than that."""

MIDDLE: dict[str, Any] = {
    "hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
    "num_hidden_layers": 10, "max_position_embeddings": 2048,
}  # fmt: skip

KINDS = [(family, attention) for family in CONFIGS for attention in family_of(tiny_config(family)).attentions]


def compare(span: FrozenSpan, memory: CallMemory, batch: int, length: int, *, masked: bool) -> list[float]:
    """How many times what is allocated the estimate is: of a forward, of one that is kept, and of a backward."""
    executor = Executor(SiteHost(span), span.dtype, 1 << 40)
    shape = (batch, length, span.hidden_size)
    mask = torch.ones(shape[:2], dtype=torch.long)
    mask[:, -3:] = 0
    given, gradient = SpanInput(torch.randn(shape), mask if masked else None), torch.randn(shape)
    # What goes out is encoded as fp32 at the most.
    forward = peak_bytes(lambda: executor.forward(b"s", 1, given, keep=False).hidden.float())
    kept = peak_bytes(lambda: executor.forward(b"s", 1, given, keep=True).hidden.float())
    graph = executor.cache.used
    through = graph + peak_bytes(lambda: executor.backward(b"s", 1, gradient).hidden)
    again = peak_bytes(lambda: executor.backward(b"s", 1, gradient, given).hidden)
    call = CallShape(batch, length, Pass.FORWARD, masked)
    found = {Pass.FORWARD: forward, Pass.KEPT_FORWARD: kept, Pass.BACKWARD: max(through, again)}
    return [memory.of(replace(call, what=what)) / peak for what, peak in found.items()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "attention"), KINDS)
def test_a_call_takes_no_more_than_is_estimated(
    family: str, attention: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(family, tmp_path / "model")
    span = load_span(folder, SplitPlan.parse("2:2", N_LAYERS), attn_implementation=attention, dtype=dtype)
    for batch, length, masked in ((1, 128, True), (8, 16, False)):
        ratios = compare(span, call_memory(span), batch, length, masked=masked)
        assert all(1 <= ratio <= MOST for ratio in ratios), (batch, length, masked, ratios)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_same_of_a_larger_model_and_longer_sequences(attention: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama", tmp_path / "model", **MIDDLE)
    span = load_span(folder, SplitPlan.parse("1:1", 10), attn_implementation=attention)
    memory = call_memory(span)
    for batch, length, masked in ((1, 512, True), (2, 256, False)):
        ratios = compare(span, memory, batch, length, masked=masked)
        assert all(1 <= ratio <= 2 for ratio in ratios), ratios
    # The control: an estimate that forgets what attention makes for each pair of positions is found out.
    without = replace(memory, eager=False)
    if attention == "eager":
        assert min(compare(span, without, 1, 512, masked=False)) < 1
    else:
        unmasked = CallShape(1, 512, Pass.KEPT_FORWARD)
        assert memory.of(unmasked) < 0.8 * memory.of(replace(unmasked, masked=True))


def test_sites_take_what_they_keep_and_what_passes(tmp_path: Path) -> None:
    span = load_span(tiny_checkpoint("llama", tmp_path / "model"), SplitPlan.parse("2:2", N_LAYERS))
    memory, call = call_memory(span), CallShape(2, 8, Pass.FORWARD)
    assert memory.of(replace(call, kept=10, passing=3)) - memory.of(call) == 2 * 8 * 4 * 13
