"""Where a method puts its adapters: on which layers and modules, at sites of the cloud's layers, and by which names."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models.small_training import config, named_layers, weights
from support.models.tiny import tiny_config
from transformers import AutoModelForCausalLM

from isthmus.backbone.adapters.adapter_files import load_adapter, save_adapter
from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import ConfigError
from isthmus.edge.training.methods import build_peft, trained


@pytest.mark.parametrize(
    ("sites", "layers"),
    [("none", {0, 4, 5}), ("all", {0, 1, 2, 3, 4, 5}), ("2", {0, 2, 4, 5}), ([1, 3], {0, 1, 3, 4, 5})],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("method", ["lora", "vera", "adalora", "ia3"])
def test_sites_are_layers_of_the_cloud_that_get_adapters_too(
    tmp_path: Path, family: str, method: str, sites: Any, layers: set[int]
) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    every = {name for name, _ in model.named_modules()}
    model.split_plan = SplitPlan.parse("1:2", 6)
    tuned = build_peft(model, config(tmp_path, method=method, rank=2, sites=sites), total_steps=10)
    assert named_layers(trained(tuned)) == layers
    targets = tuned.active_peft_config.target_modules
    assert targets <= every
    assert named_layers(targets) == layers
    assert getattr(tuned.active_peft_config, "layers_to_transform", None) is None


def test_sites_change_nothing_of_the_edges_own_adapters(tmp_path: Path) -> None:
    found = []
    for sites in ("none", "all"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
        model.split_plan = SplitPlan.parse("1:2", 6)
        tuned = build_peft(model, config(tmp_path, sites=sites))
        found.append({name: value.shape for name, value in weights(tuned).items()})
    assert found[0].items() < found[1].items()


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ("all", "sites = all: this model has no sites in the cloud's layers"),
        ("2,3", "sites = 2,3: this model has no sites in the cloud's layers"),
        ("0,2", r"sites = 0,2: layer 0 is not the cloud's, which holds layers 1 to 3"),
        ("3-7", r"sites = 3,4,5,6,7: layer 4 is not the cloud's"),
    ],
)
def test_layers_without_sites(tmp_path: Path, sites: str, message: str) -> None:
    model = hollow(SplitPlan.parse("1:2", 6))
    with pytest.raises(ConfigError, match=message):
        build_peft(model, config(tmp_path, sites=sites))


def test_a_whole_model_has_no_cloud(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the cloud holds no layer of this model"):
        build_peft(AutoModelForCausalLM.from_config(tiny_config("llama")), config(tmp_path, sites="all"))


def hollow(plan: SplitPlan) -> Any:
    """A model whose cloud layers have no modules."""
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    for index in plan.cloud:
        model.model.layers[index] = torch.nn.Identity()
    model.split_plan = plan
    return model


@pytest.mark.parametrize("method", ["lora", "vera", "adalora", "ia3"])
def test_a_saved_adapter_names_its_modules_in_full(tmp_path: Path, method: str) -> None:
    """Of twenty names and more, PEFT would keep what tells them apart in this model: `q_proj`, for all of the whole."""
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    if method == "vera":  # one shape only
        modules = ["q_proj", "o_proj"]
    plan = SplitPlan.parse("4:1" if method != "vera" else "9:1", 11)
    base = AutoModelForCausalLM.from_config(tiny_config("llama", num_hidden_layers=11))
    edge = copy.deepcopy(base)
    for index in plan.cloud:
        edge.model.layers[index] = torch.nn.Identity()
    edge.split_plan = plan
    tuned = build_peft(edge, config(tmp_path, method=method, rank=2, target_modules=modules), total_steps=10)
    save_adapter(tuned, tmp_path / "adapter")
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert len(named) == len(modules) * len(plan.edge_layers) >= 20
    assert all(re.fullmatch(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+", name) for name in named)
    loaded = load_adapter(base, tmp_path / "adapter", trainable=method != "adalora")
    prefix = "lora_" if method in {"lora", "adalora"} else f"{method}_"
    adapted = {name for name, _ in loaded.named_parameters() if f".{prefix}" in name}
    assert named_layers(adapted) == set(plan.edge_layers)


def test_a_whole_model_can_be_given_the_same_layers(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    found = trained(build_peft(model, config(tmp_path), layers=[0, 5]))
    assert {name.split(".layers.")[1][0] for name in found} == {"0", "5"}


def test_the_seed_decides_the_start(tmp_path: Path) -> None:
    def start(seed: int) -> list[torch.Tensor]:
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
        return [
            value for name, value in weights(build_peft(model, config(tmp_path, seed=seed))).items() if "lora_A" in name
        ]

    assert all(map(torch.equal, start(1), start(1)))
    assert not any(map(torch.equal, start(1), start(2)))


@pytest.mark.parametrize("method", ["lora", "ia3", "vera", "adalora"])
def test_modules_that_the_edge_does_not_have(tmp_path: Path, method: str) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with pytest.raises(ConfigError, match=r"nonsense"):
        build_peft(model, config(tmp_path, method=method, target_modules=["nonsense"]), total_steps=10)


def test_an_edge_without_layers(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    model.split_plan = SimpleNamespace(edge_layers=())
    with pytest.raises(ConfigError, match="the edge holds none"):
        build_peft(model, config(tmp_path))
    assert trained(build_peft(model, config(tmp_path, method="prompt")))


def test_adalora_needs_the_number_of_steps(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with pytest.raises(ConfigError, match="--steps"):
        build_peft(model, config(tmp_path, method="adalora", steps=None))
