"""Frozen linears that are held in bf16, against autocast's casts in every forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.models.small_training import config, trainer
from support.models.tiny import N_LAYERS, tiny_checkpoint
from torch import nn
from transformers.pytorch_utils import Conv1D

from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.backbone.split.span import load_span
from isthmus.edge.training.methods import build_peft, trained
from isthmus.edge.training.precision import hold_frozen_linears

PLAN = SplitPlan.parse("1:2", N_LAYERS)


@pytest.fixture(scope="module", params=["llama", "llama_tied", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = request.param
    biases = {} if name == "gpt2" else {"attention_bias": True}
    return tiny_checkpoint(name, tmp_path_factory.mktemp("model"), **biases)


def edge(folder: Path) -> Any:
    return load_edge_parts(folder, PLAN, load_span(folder, PLAN))


def trained_bits(
    folder: Path, out: Path, method: str, *, held: bool, **values: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and what was trained, of four steps in bf16."""
    options = config(out, method=method, steps=4, rank=2, virtual_tokens=3, precision="bf16", **values)
    model = build_peft(edge(folder), options, total_steps=4)
    if held:
        hold_frozen_linears(model, options)
    run = trainer(folder, options, model=model)
    report = run.fit().report
    losses = [json.loads(line)["loss"] for line in (out / "losses.jsonl").read_text().splitlines()]
    return [report.loss_before, *losses, report.loss_after], dict(trained(model))


@pytest.mark.parametrize(
    "method", ["lora", "ia3", "vera", "adalora", "prompt", "bottleneck", "bitfit", "low_rank", "full"]
)
def test_a_run_has_the_bits_of_one_that_casts_in_every_forward(folder: Path, tmp_path: Path, method: str) -> None:
    losses, values = trained_bits(folder, tmp_path / "held", method, held=True)
    wanted, expected = trained_bits(folder, tmp_path / "cast", method, held=False)
    assert len(set(losses)) > 1
    assert losses == wanted
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[name], expected[name]) for name in values)


def test_doras_norms_differ_by_rounding(folder: Path, tmp_path: Path) -> None:
    losses, _ = trained_bits(folder, tmp_path / "held", "dora", held=True)
    wanted, _ = trained_bits(folder, tmp_path / "cast", "dora", held=False)
    assert losses == pytest.approx(wanted, rel=0.01)


def test_what_is_trained_and_what_is_no_linear_stays_fp32(folder: Path, tmp_path: Path) -> None:
    options = config(tmp_path, method="lora", rank=2)
    model = build_peft(edge(folder), options, total_steps=4)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    hold_frozen_linears(model, options)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    hold_frozen_linears(model, options.model_copy(update={"precision": "bf16"}))
    linears = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    held = [each for module in linears for each in module.parameters(recurse=False) if not each.requires_grad]
    assert len(held) > 6
    assert {parameter.dtype for parameter in held} == {torch.bfloat16}
    those = {id(each) for each in held}
    for name, parameter in model.named_parameters():
        if id(parameter) not in those:
            assert torch.equal(parameter, before[name]), name
        elif name in before:
            assert torch.equal(parameter, before[name].to(torch.bfloat16)), name
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16


def test_the_frozen_weights_that_full_saves_are_those_that_it_was_given(folder: Path, tmp_path: Path) -> None:
    trained_bits(folder, tmp_path, "full", held=True)
    head = edge(folder).get_output_embeddings().weight
    saved = load_file(next((tmp_path / "adapter").glob("*.safetensors")))
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    same = [name for name, tensor in saved.items() if tensor.shape == head.shape and torch.equal(tensor, head)]
    assert same


@pytest.mark.parametrize("optimizer", ["lora-fa", "lora-plus", "mezo"])
def test_an_optimizers_adapter_is_saved_in_fp32(folder: Path, tmp_path: Path, optimizer: str) -> None:
    trained_bits(folder, tmp_path, "lora", held=True, optimizer=optimizer, dropout=0.0)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert any(tensor.count_nonzero() for name, tensor in saved.items() if "lora_B" in name)
