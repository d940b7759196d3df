"""Emulators: a whole middle is the model itself; a smaller one is what its recipe says, in memory and in its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import CONFIGS, HIDDEN, N_LAYERS, VOCAB
from torch import Tensor
from transformers import AutoModelForCausalLM

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.families import family_of
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.backbone.split.span import load_span
from isthmus.common.errors import CheckpointError, ConfigError, NonFiniteError, PlanError
from isthmus.emulator.compress.emulator_model import Emulator, build_emulator, load_emulator, save_emulator
from isthmus.emulator.compress.layer_measures import linear_cka, measure, relative_error
from isthmus.emulator.compress.recipe import Recipe
from isthmus.emulator.compress.svd import LowRankLinear, linear_modules

from ..conftest import Checkpoints

PLAN = SplitPlan.parse("1:1", N_LAYERS)
MIDDLE = len(PLAN.cloud)
RECIPES = (
    "uniform",
    "importance",
    "crash",
    "crash-drop",
    "uniform+lowrank:0.25",
    "uniform+int8",
    "crash+int4",
    "importance+lowrank:0.25+int4",
    "uniform+bridged",
    "importance+bridged+lowrank:0.25+int8",
)


def make(checkpoint: Checkpoint, text: str, keep: float, blocks: Tensor | None = None, **options: Any) -> Emulator:
    return build_emulator(checkpoint, PLAN, Recipe.parse(text, keep), blocks, **options)


def hidden_states(seed: int = 0, length: int = 20) -> Tensor:
    return torch.randn(2, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_saved_is_what_is_loaded(checkpoints: Checkpoints, blocks: Tensor, family: str, tmp_path: Path) -> None:
    checkpoint = checkpoints(family)
    for text in RECIPES:
        emulator = make(checkpoint, text, 0.5, blocks)
        emulator.quantize()
        folder = tmp_path / text
        save_emulator(emulator, folder)
        loaded = load_emulator(folder, checkpoint.config)
        assert (loaded.layers, loaded.recipe, loaded.bridges) == (emulator.layers, emulator.recipe, emulator.bridges)
        assert torch.equal(loaded(hidden_states()), emulator(hidden_states())), text
        assert {name: tuple(each.shape) for name, each in loaded.tensors().items()} == {
            name: tuple(each.shape) for name, each in emulator.tensors().items()
        }
        assert sum(each.nbytes for each in load_file(folder / "emulator.safetensors").values()) == emulator.n_bytes
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        save_emulator(loaded, tmp_path / "again")
        for name in ("emulator.json", "emulator.safetensors"):
            assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), text


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


def test_importance_drops_the_layer_that_does_nothing(checkpoints: Checkpoints, blocks: Tensor, tmp_path: Path) -> None:
    source = checkpoints("llama")
    model = AutoModelForCausalLM.from_pretrained(source.folder)
    with torch.no_grad():
        for layer, share in ((2, 0.0), (4, 1e-3)):
            model.model.layers[layer].self_attn.o_proj.weight.mul_(share)
            model.model.layers[layer].mlp.down_proj.weight.mul_(share)
    model.save_pretrained(tmp_path)
    emulator = make(Checkpoint(tmp_path, "idle"), "importance", 0.5, blocks)
    assert emulator.layers == (1, 3)
    measures = emulator.measures
    assert measures is not None
    assert measures.removed == (1, 3)
    assert measures.removal_errors[0] < 1e-9 < measures.removal_errors[1] < 1e-2
    assert measures.influence[1] < 1e-6 < min(measures.influence[0], measures.influence[2])


def test_a_removal_order_goes_on_from_what_is_known(checkpoints: Checkpoints, blocks: Tensor) -> None:
    checkpoint = checkpoints("llama")
    at_once = measure(checkpoint, PLAN, Recipe("importance", 0.25), blocks)
    half = measure(checkpoint, PLAN, Recipe("importance", 0.5), blocks)
    assert measure(checkpoint, PLAN, Recipe("importance", 0.25), blocks, known=half) == at_once
    assert at_once.removed[: len(half.removed)] == half.removed
    assert len(at_once.removed) > len(half.removed)
    both = measure(checkpoint, PLAN, Recipe("crash", 0.5), blocks, known=half)
    assert both == replace(half, similarity=measure(checkpoint, PLAN, Recipe("crash", 0.5), blocks).similarity)


def test_the_measured_error_is_that_of_the_emulator(checkpoints: Checkpoints, blocks: Tensor) -> None:
    checkpoint = checkpoints("gemma3_text")
    emulator = make(checkpoint, "importance", 0.5, blocks)
    seen: list[Tensor] = []
    edge = load_edge_parts(checkpoint, PLAN, lambda hidden, *_: seen.append(hidden) or hidden)  # type: ignore[func-returns-value]  # the list's answer is None
    with torch.no_grad():
        edge(input_ids=blocks, use_cache=False)
        error = relative_error(emulator(seen[0]), load_span(checkpoint, PLAN)(seen[0])).item()
    assert emulator.measures is not None
    assert emulator.measures.removal_errors[-1] == pytest.approx(error, rel=1e-4)


def test_cka_is_one_for_a_turned_and_scaled_copy_and_low_for_noise() -> None:
    x = hidden_states(1, 400)
    turn, _ = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(2)))
    table = linear_cka([x, 3 * x @ turn + 1, hidden_states(3, 400)])
    assert table[0][1] == pytest.approx(1.0, abs=1e-4)
    assert table[0][2] == table[2][0] < 0.2


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_low_rank_layers_are_the_best_of_their_rank_and_can_be_trained(checkpoints: Checkpoints, family: str) -> None:
    checkpoint = checkpoints(family)
    whole, emulator = make(checkpoint, "uniform", 0.5), make(checkpoint, "uniform+lowrank:0.25", 0.5)
    layer_list = family_of(checkpoint.config).layers
    layer, smaller = (getattr(each.base, layer_list)[0] for each in (whole, emulator))
    seen = 0
    for name, module in linear_modules(layer):
        product = smaller.get_submodule(name)
        assert isinstance(product, LowRankLinear)
        rank = round(0.25 * min(module.weight.shape))
        assert product.down.shape[0] == product.up.shape[1] == rank
        weight = module.weight.T if family == "gpt2" else module.weight
        missing = torch.linalg.svdvals(weight)[rank:].square().sum()
        assert (weight - product.up @ product.down).square().sum().item() == pytest.approx(missing.item(), rel=1e-3)
        seen += 1
    assert seen >= 4
    assert emulator.n_params < whole.n_params
    emulator.trainable(True)
    emulator(hidden_states()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in emulator.parameters())
    assert any(name.endswith(".down") for name in emulator.tensors())


def test_factors_that_would_not_be_smaller_are_not_made(checkpoints: Checkpoints) -> None:
    emulator = make(checkpoints("llama"), "uniform+lowrank:0.7", 0.5)
    layer = emulator.base.layers[0]
    assert not isinstance(layer.self_attn.q_proj, LowRankLinear)
    assert not isinstance(layer.mlp.up_proj, LowRankLinear)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.01), (4, 0.15)])
def test_quantized_weights_are_near_and_their_file_is_small(
    checkpoints: Checkpoints, bits: int, most: float, tmp_path: Path
) -> None:
    checkpoint = checkpoints("gpt2")
    whole = make(checkpoint, "uniform", 0.5)
    emulator = make(checkpoint, f"uniform+int{bits}", 0.5)
    save_emulator(emulator, tmp_path)
    loaded = load_emulator(tmp_path, checkpoint.config)
    assert torch.equal(emulator(hidden_states()), whole(hidden_states()))  # saving leaves it as it was
    weights = emulator.tensors()
    for name in emulator.quantized_names():
        error = (loaded.tensors()[name] - weights[name]).norm() / weights[name].norm()
        assert 0 < error < most
    others = weights.keys() - emulator.quantized_names()
    assert all(torch.equal(loaded.tensors()[name], weights[name]) for name in others)
    assert emulator.n_bytes < whole.n_bytes * (bits / 32 + 0.1)


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


def test_weights_that_are_not_finite_are_not_saved(checkpoints: Checkpoints, tmp_path: Path) -> None:
    emulator = make(checkpoints("llama"), "uniform", 0.5)
    with torch.no_grad():
        emulator.tensors()["layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        save_emulator(emulator, tmp_path)
    assert list(tmp_path.iterdir()) == []


Q_PROJ = "layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({Q_PROJ: None}, f"lacks the tensor {Q_PROJ}"),
        ({"layers.9.x": torch.ones(1)}, "strange tensor layers.9.x"),
        ({Q_PROJ: torch.ones(HIDDEN, HIDDEN + 1)}, f"{Q_PROJ} .* \\[32, 33\\]"),
        ({Q_PROJ: torch.ones(HIDDEN, HIDDEN, dtype=torch.int8)}, "is I8"),
        ({Q_PROJ: torch.ones(HIDDEN, HIDDEN, dtype=torch.float64)}, "is F64"),
        ({Q_PROJ: torch.full((HIDDEN, HIDDEN), float("inf"))}, f"{Q_PROJ} in .* is not finite"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    checkpoints: Checkpoints, tmp_path: Path, change: dict[str, Tensor | None], says: str
) -> None:
    checkpoint = checkpoints("llama")
    save_emulator(make(checkpoint, "uniform", 0.5), tmp_path)
    path = tmp_path / "emulator.safetensors"
    changed = {**load_file(path), **change}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)
    with pytest.raises(CheckpointError, match=says):
        load_emulator(tmp_path, checkpoint.config)


def test_a_quantized_file_with_bad_scales_or_values_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints("llama")
    save_emulator(make(checkpoint, "uniform+int4", 0.5), tmp_path)
    path = tmp_path / "emulator.safetensors"
    stored = load_file(path)
    for name, bad, says in (
        (f"{Q_PROJ}.scale", torch.full((HIDDEN, 1), float("nan"), dtype=torch.bfloat16), "not finite"),
        (f"{Q_PROJ}.scale", torch.ones(HIDDEN, 1), "is F32"),
        (f"{Q_PROJ}.int4", torch.ones(HIDDEN, HIDDEN // 2, dtype=torch.int8), "is I8"),
    ):
        save_file({**stored, name: bad}, path)
        with pytest.raises(CheckpointError, match=says):
            load_emulator(tmp_path, checkpoint.config)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": [1, 6]},
        {"layers": [4, 1]},
        {"layers": []},
        {"layers": [1] * 7},
        {"layers": ["1"]},
        {"layers": [True, 2]},
        {"layers": 5},
        {"keep": "0.5"},
        {"keep": 10**400},
        {"keep": 7},
        {"recipe": "magic"},
        {"recipe": ["uniform"]},
        {"format": 2},
        {"more": 1},
        {"bridges": [1]},
    ],
)
def test_a_description_that_does_not_fit_is_refused(
    checkpoints: Checkpoints, tmp_path: Path, change: dict[str, Any]
) -> None:
    checkpoint = checkpoints("llama")
    save_emulator(make(checkpoint, "uniform", 0.5), tmp_path)
    path = tmp_path / "emulator.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=r"emulator\.json"):
        load_emulator(tmp_path, checkpoint.config)


def test_a_damaged_or_missing_file_and_another_model_are_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints("llama")
    with pytest.raises(CheckpointError, match=r"emulator\.json"):
        load_emulator(tmp_path, checkpoint.config)
    save_emulator(make(checkpoint, "uniform", 0.5), tmp_path)
    with pytest.raises(CheckpointError, match="another model"):
        load_emulator(tmp_path, checkpoints("llama", intermediate_size=48).config)
    path = tmp_path / "emulator.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"emulator\.safetensors is damaged"):
        load_emulator(tmp_path, checkpoint.config)


def test_half_precision_is_kept(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints("llama")
    emulator = make(checkpoint, "uniform", 0.5, dtype=torch.bfloat16)
    assert emulator.dtype == torch.bfloat16
    save_emulator(emulator, tmp_path)
    loaded = load_emulator(tmp_path, checkpoint.config, dtype=torch.bfloat16)
    assert torch.equal(loaded(hidden_states().bfloat16()), emulator(hidden_states().bfloat16()))
    assert emulator.n_bytes * 2 == make(checkpoint, "uniform", 0.5).n_bytes
