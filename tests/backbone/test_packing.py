"""Several inputs in one pass, against a pass of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import CONFIGS, tiny_checkpoint
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from isthmus.backbone.packing import Packer, taking_several
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.sources import Checkpoint
from isthmus.backbone.span import FrozenSpan, SpanInput, load_span

SHAPES = ((2, 7), (1, 12), (3, 7), (1, 5), (2, 9), (2, 9))


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
    given = inputs(span)
    outputs = Packer(span)(given)
    upstream = [torch.randn(output.shape).to(dtype) for output in outputs]
    gradients = torch.autograd.grad(outputs, [each.hidden for each in given], upstream)
    for each, output, gradient, found in zip(given, outputs, upstream, gradients, strict=True):
        alone = each.hidden.detach().clone().requires_grad_()
        expected = span(alone, each.attention_mask, each.position_ids)
        assert torch.equal(output, expected)
        assert torch.equal(found, *torch.autograd.grad(expected, alone, gradient))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_bf16_is_computed_in_fp32_and_keeps_its_inputs_only(masked: bool) -> None:
    module = nn.Module()
    states = [torch.randn(2, 4, 9, 16).to(torch.bfloat16).requires_grad_() for _ in range(3)]
    mask = torch.randn(2, 1, 9, 9).to(torch.bfloat16) if masked else None
    attend = ALL_ATTENTION_FUNCTIONS[taking_several("sdpa")]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        output = attend(module, *states, mask)[0]
    assert sorted(each.data_ptr() for each in kept) == sorted(each.data_ptr() for each in states)
    exact = [each.detach().float().requires_grad_() for each in states]
    expected = functional.scaled_dot_product_attention(
        *exact, attn_mask=None if mask is None else mask.float(), is_causal=not masked
    ).transpose(1, 2)
    assert torch.equal(output, expected.to(torch.bfloat16))
    upstream = torch.randn(output.shape).to(torch.bfloat16)
    gradients = torch.autograd.grad(output, states, upstream)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, exact, upstream.float()), strict=True):
        assert torch.equal(found, wanted.to(torch.bfloat16))


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
