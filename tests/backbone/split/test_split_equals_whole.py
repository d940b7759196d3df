"""The cut model computes what the whole one does, bit for bit: logits, loss, the gradients of the edge."""

from __future__ import annotations

import pytest
import torch
from support.models.tiny import CONFIGS, WINDOW

from ..conftest import KINDS, Pair, Pairs, batch

PLANS = ("2:2", "1:2", "0:3", "3:0", "0:0", "2:3")


def run(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    output = model(**inputs, use_cache=False)
    if torch.isfinite(output.loss):  # a single token has no next one, so no loss
        output.loss.backward()
    else:
        output.logits.square().mean().backward()
    return output.logits, output.loss


def assert_same(pair: Pair, inputs: dict[str, torch.Tensor]) -> None:
    logits, loss = run(pair.whole, inputs)
    edge_logits, edge_loss = run(pair.edge, inputs)
    assert torch.equal(logits, edge_logits)
    assert torch.equal(loss, edge_loss) or (loss.isnan() and edge_loss.isnan())
    whole = dict(pair.whole.named_parameters())
    seen = 0
    for name, parameter in pair.edge.named_parameters():
        expected = whole[name].grad
        assert expected is not None, name
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, expected), name
        seen += int(bool(expected.abs().sum() > 0))
    assert seen > 0
    assert all(parameter.grad is None for parameter in pair.span.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_and_batch(pairs: Pairs, family: str, kind: str) -> None:
    inputs = batch(kind)
    assert inputs["input_ids"].shape[1] in {1, 24}  # longer than the sliding window
    assert WINDOW < 24
    assert_same(pairs(family), inputs)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_and_plan(pairs: Pairs, family: str, plan: str) -> None:
    assert_same(pairs(family, plan), batch("left_padded"))


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_training_edge_leaves_the_span_in_eval_mode(pairs: Pairs, family: str) -> None:
    pair = pairs(family)
    pair.edge.train()
    pair.span.train()
    assert not any(module.training for module in pair.span.modules())
    dropped = [module for module in pair.edge.modules() if isinstance(module, torch.nn.Dropout) and module.p > 0]
    for module in dropped:
        module.eval()
    for module in pair.edge.modules():  # OPT drops by a function that reads its own layer's mode
        if type(module).__name__ in {"OPTDecoderLayer", "OPTAttention", "GPT2Attention"}:
            module.training = False
    assert pair.edge.training
    assert_same(pair, batch("right_padded"))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bf16_parts_agree_with_the_whole_model_in_bf16(pairs: Pairs, family: str) -> None:
    from isthmus.backbone.split.edge_parts import load_edge_parts
    from isthmus.backbone.split.span import load_span

    pair = pairs(family)
    span = load_span(pair.folder, pair.plan, dtype=torch.bfloat16)
    edge = load_edge_parts(pair.folder, pair.plan, span, dtype=torch.bfloat16)
    whole = type(pair.whole).from_pretrained(
        pair.folder, dtype=torch.bfloat16, attn_implementation=pair.whole.config._attn_implementation
    )
    inputs = batch("left_padded")
    assert span.dtype == torch.bfloat16
    assert torch.equal(edge(**inputs).logits, whole(**inputs, use_cache=False).logits)


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_generation_gives_the_whole_models_tokens(pairs: Pairs, family: str) -> None:
    pair = pairs(family)
    inputs = batch("left_padded", rows=2, length=12)
    del inputs["labels"]
    expected = pair.whole.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(pair.edge.generate(**inputs, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_sampling_and_beam_search_give_the_whole_models_tokens(pairs: Pairs, family: str) -> None:
    pair = pairs(family, "0:2")
    inputs = batch("left_padded", rows=2, length=12)
    del inputs["labels"]
    for options in ({"do_sample": True, "top_k": 20}, {"num_beams": 3, "do_sample": False}):
        torch.manual_seed(3)
        expected = pair.whole.generate(**inputs, max_new_tokens=6, use_cache=False, **options)
        torch.manual_seed(3)
        assert torch.equal(pair.edge.generate(**inputs, max_new_tokens=6, **options), expected)
