"""Emulators in memory: a whole middle is the model itself, and a smaller one is what its recipe says."""

from __future__ import annotations

import pytest
import torch
from support.models.tiny import CONFIGS, N_LAYERS, VOCAB
from torch import Tensor
from transformers import AutoModelForCausalLM

from isthmus.backbone.families import family_of
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.backbone.split.span import load_span
from isthmus.common.errors import ConfigError, PlanError
from isthmus.emulator.compress.emulator_model import build_emulator
from isthmus.emulator.compress.recipe import Recipe

from ..conftest import PLAN, Checkpoints, hidden_states, make

MIDDLE = len(PLAN.cloud)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (3, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("family", CONFIGS)
def test_a_whole_middle_is_the_whole_model_bit_for_bit(checkpoints: Checkpoints, family: str) -> None:
    checkpoint = checkpoints(family)
    attention = family_of(checkpoint.config).attentions[0]
    whole = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32, attn_implementation=attention)
    emulator = make(checkpoint, "uniform", 1.0)
    edge = load_edge_parts(checkpoint, PLAN, emulator)
    outputs = [model(**batch(), use_cache=False) for model in (whole, edge)]
    for output in outputs:
        output.loss.backward()
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for name, parameter in edge.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name
    assert all(parameter.grad is None for parameter in emulator.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2_scaled", "gemma3_text", "qwen2_sliding", "opt"])
def test_dropped_layers_leave_the_others_as_they_are(checkpoints: Checkpoints, family: str) -> None:
    checkpoint = checkpoints(family)
    emulator = make(checkpoint, "uniform", 0.5)
    assert emulator.layers == (1, 4)
    expected = hidden_states()
    for layer in emulator.layers:
        expected = load_span(checkpoint, SplitPlan(N_LAYERS, layer, N_LAYERS - layer - 1))(expected)
    assert torch.equal(emulator(hidden_states()), expected)


def test_a_shared_layer_runs_again_and_is_held_once(checkpoints: Checkpoints, blocks: Tensor) -> None:
    checkpoint = checkpoints("llama")
    emulator = make(checkpoint, "crash", 0.25, blocks)
    (layer,) = set(emulator.layers)
    assert emulator.layers == (layer,) * MIDDLE
    span = load_span(checkpoint, SplitPlan(N_LAYERS, layer, N_LAYERS - layer - 1))
    expected = hidden_states()
    for _ in range(MIDDLE):
        expected = span(expected)
    assert torch.equal(emulator(hidden_states()), expected)
    assert emulator.n_params == span.n_params
    assert {name.split(".")[1] for name in emulator.tensors()} == {str(layer)}


def test_it_stays_in_eval_mode_and_is_frozen_unless_told(checkpoints: Checkpoints) -> None:
    emulator = make(checkpoints("gpt2"), "uniform", 0.5)
    emulator.train()
    assert not any(module.training for module in emulator.modules())
    assert not any(parameter.requires_grad for parameter in emulator.parameters())
    assert emulator.trainable(True) is emulator
    assert all(parameter.requires_grad for parameter in emulator.parameters())
    emulator.trainable(False)
    hidden = hidden_states().requires_grad_()
    emulator(hidden).sum().backward()
    assert hidden.grad is not None


def test_bad_wishes_are_refused(checkpoints: Checkpoints, blocks: Tensor) -> None:
    checkpoint = checkpoints("llama")
    with pytest.raises(PlanError, match=r"keep 0.1 of 4 middle layers leaves none"):
        make(checkpoint, "importance", 0.1, blocks)
    with pytest.raises(ConfigError, match="--text"):
        make(checkpoint, "importance", 0.5)
    with pytest.raises(PlanError, match="8 layers, but the model has 6"):
        build_emulator(checkpoint, SplitPlan.parse("2:2", 8), Recipe("uniform", 0.5), None)
