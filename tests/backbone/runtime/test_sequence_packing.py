"""Several inputs in one pass, against a pass of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.models.tiny import CONFIGS, tiny_checkpoint

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.runtime.batch_invariance import measure_batch_invariance
from isthmus.backbone.runtime.sequence_packing import Packer
from isthmus.backbone.split.span import FrozenSpan, SpanInput, load_span

SHAPES = ((4, 7), (1, 24), (5, 7), (1, 5), (3, 9), (3, 9))


def span_of(name: str, folder: Path, dtype: torch.dtype) -> FrozenSpan:
    checkpoint = Checkpoint(tiny_checkpoint(name, folder / name), name)
    return load_span(checkpoint, SplitPlan.parse("1:1", checkpoint.config.num_hidden_layers), dtype=dtype)


def inputs(span: FrozenSpan) -> list[SpanInput]:
    """Of several lengths; padded on either side and not, with position ids and without."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for number, (rows, length) in enumerate(SHAPES):
        hidden = torch.randn(rows, length, span.hidden_size, generator=generator).to(span.dtype)
        mask = None if number in (0, 5) else torch.ones(rows, length, dtype=torch.long)
        if number == 1 and mask is not None:
            mask[:, :3] = 0
        if number == 4 and mask is not None:
            mask[0, -2:] = 0
        positions = torch.arange(length)[None] if number in (2, 5) else None
        result.append(SpanInput(hidden.requires_grad_(), mask, positions))
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_has_the_bits_of_passes_of_their_own(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    span = span_of(name, tmp_path, dtype)
    threads = torch.get_num_threads()
    rows = measure_batch_invariance(span, threads, threads).rows
    assert rows is not None, "products so small have the same bits on any processor"
    assert rows <= 24
    given = inputs(span)
    outputs = Packer(span)(given)
    upstream = [torch.randn(output.shape).to(dtype) for output in outputs]
    gradients = torch.autograd.grad(outputs, [each.hidden for each in given], upstream)
    for each, output, gradient, found in zip(given, outputs, upstream, gradients, strict=True):
        alone = each.hidden.detach().clone().requires_grad_()
        expected = span(alone, each.attention_mask, each.position_ids)
        wanted = torch.autograd.grad(expected, alone, gradient)[0]
        if each.positions >= rows:
            assert torch.equal(output, expected)
            assert torch.equal(found, wanted)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(found, wanted)


def test_the_span_is_as_it_was_afterwards(tmp_path: Path) -> None:
    span = span_of("llama", tmp_path, torch.float32)
    given = inputs(span)
    before = span(given[0].hidden)
    layers, attention = span.base.layers, span.config._attn_implementation
    Packer(span)(given)
    assert span.base.layers is layers
    assert span.config._attn_implementation == attention
    assert torch.equal(span(given[0].hidden), before)
    wrong = SpanInput(given[0].hidden, torch.ones(3, 3, 3), None)
    with pytest.raises((ValueError, RuntimeError, IndexError, TypeError)):
        Packer(span)([given[0], wrong])
    assert span.base.layers is layers
    assert span.config._attn_implementation == attention
