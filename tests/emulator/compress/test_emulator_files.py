"""An emulator's files: what is saved is what is loaded, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models.tiny import CONFIGS, HIDDEN
from torch import Tensor

from isthmus.common.errors import CheckpointError, NonFiniteError
from isthmus.emulator.compress.emulator_files import load_emulator, save_emulator

from ..conftest import Checkpoints, hidden_states, make

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
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        save_emulator(loaded, tmp_path / "again")
        for name in ("emulator.json", "emulator.safetensors"):
            assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), text


@pytest.mark.parametrize(("bits", "most"), [(8, 0.01), (4, 0.15)])
def test_quantized_weights_are_near_and_their_file_is_small(
    checkpoints: Checkpoints, bits: int, most: float, tmp_path: Path
) -> None:
    checkpoint = checkpoints("gpt2")
    whole = make(checkpoint, "uniform", 0.5)
    emulator = make(checkpoint, f"uniform+int{bits}", 0.5)
    save_emulator(emulator, tmp_path)
    save_emulator(whole, tmp_path / "whole")
    loaded = load_emulator(tmp_path, checkpoint.config)
    assert torch.equal(emulator(hidden_states()), whole(hidden_states()))  # saving leaves it as it was
    weights = emulator.tensors()
    for name in emulator.quantized_names():
        error = (loaded.tensors()[name] - weights[name]).norm() / weights[name].norm()
        assert 0 < error < most
    others = weights.keys() - emulator.quantized_names()
    assert all(torch.equal(loaded.tensors()[name], weights[name]) for name in others)
    small, large = (
        sum(each.nbytes for each in load_file(folder / "emulator.safetensors").values())
        for folder in (tmp_path, tmp_path / "whole")
    )
    assert small < large * (bits / 32 + 0.1)


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
        ({Q_PROJ: None}, f"lacks the tensor '{Q_PROJ}'"),
        ({"layers.9.x": torch.ones(1)}, "strange tensor 'layers.9.x'"),
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
