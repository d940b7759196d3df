"""What a call takes in memory: the estimate beside what torch allocates, and what its graph keeps."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models.kept_activations import count_kept, given_by_activations
from support.models.peak_allocations import peak_bytes
from support.models.tiny import CONFIGS, HIDDEN, N_LAYERS, tiny_checkpoint, tiny_config
from torch import Tensor, nn
from transformers.activations import ACT2FN

from isthmus.backbone.families import family_of
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.runtime.call_memory import CallMemory, CallShape, Pass, call_memory, frugal_graph, storages_of
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


# Graphs that keep little ----------------------------------------------------------------------------------------------

GATED = [family for family in CONFIGS if not family.startswith(("gpt2", "opt"))]
"""Those whose MLPs multiply what an activation function gives; with the others, nothing wants it again."""


def tiny_span(family: str, folder: Path) -> FrozenSpan:
    return load_span(tiny_checkpoint(family, folder), SplitPlan.parse("2:2", N_LAYERS))


def differentiate(module: nn.Module, x: Tensor, *, frugal: bool) -> tuple[Tensor, Tensor]:
    """The output and the input's gradient."""
    leaf = x.clone().requires_grad_(True)
    with frugal_graph(storages_of(module)) if frugal else nullcontext():
        output = module(leaf)
    (gradient,) = torch.autograd.grad(output, leaf, torch.ones_like(output))
    return output.detach(), gradient


@pytest.mark.parametrize("family", CONFIGS)
def test_a_frugal_graph_has_the_same_bits(family: str, tmp_path: Path) -> None:
    span, hidden = tiny_span(family, tmp_path / "model"), torch.randn(2, 12, HIDDEN)
    assert all(map(torch.equal, differentiate(span, hidden, frugal=True), differentiate(span, hidden, frugal=False)))


@pytest.mark.parametrize("family", GATED)
def test_every_family_with_gated_mlps_keeps_little(family: str, tmp_path: Path) -> None:
    span, kept = tiny_span(family, tmp_path / "model"), {}
    for frugal in (False, True):
        given = given_by_activations(span)
        with frugal_graph(storages_of(span)) if frugal else nullcontext():
            output = span(torch.randn(2, 12, HIDDEN, requires_grad=True))
        assert output.requires_grad
        assert len(given) == N_LAYERS - 4
        kept[frugal] = count_kept(given)
    assert kept == {False: N_LAYERS - 4, True: 0}


class Gated(nn.Module):
    """A gated MLP."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.act = ACT2FN[name]
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return self.down(self.act(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_what_an_activation_function_gives_is_not_kept(name: str) -> None:
    module, x = Gated(name), torch.randn(4, 16)
    given = given_by_activations(module)
    plain = module(x.clone().requires_grad_(True))
    assert count_kept(given) == 1
    given.clear()
    with frugal_graph(storages_of(module)) as kept:
        frugal = module(x.clone().requires_grad_(True))
    assert (count_kept(given), len(given)) == (0, 1)
    assert plain.requires_grad
    assert frugal.requires_grad
    assert kept.total == 2 * x.nbytes  # what the activation function is given, and the other factor
    assert all(map(torch.equal, differentiate(module, x, frugal=True), differentiate(module, x, frugal=False)))


def test_after_a_failure_nothing_of_it_is_left() -> None:
    module = Gated("silu")
    with pytest.raises(KeyboardInterrupt), frugal_graph(storages_of(module)):
        raise KeyboardInterrupt
    given = given_by_activations(module)
    output = module(torch.randn(4, 16, requires_grad=True))
    assert count_kept(given) == 1
    assert output.requires_grad


def test_a_graph_is_counted_within_and_not_after(tmp_path: Path) -> None:
    span, hidden = tiny_span("llama", tmp_path / "model"), torch.randn(2, 12, HIDDEN)
    with frugal_graph(storages_of(span)) as kept:
        span(hidden.clone().requires_grad_(True))
    counted = kept.total
    assert counted > hidden.nbytes
    differentiate(span, hidden, frugal=False)
    assert kept.total == counted
