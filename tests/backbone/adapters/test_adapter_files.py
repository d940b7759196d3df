"""Adapters that PEFT has not, and the folders of all kinds: on the edge's part and on the whole model they are one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.models.sited_span import Sited
from support.models.tiny import CONFIGS, HIDDEN
from torch import nn
from transformers import AutoModelForCausalLM

from isthmus.backbone.adapters.adapter_files import (
    adapter_digest,
    adapter_method,
    load_adapter,
    save_adapter,
    unfreeze_layers,
)
from isthmus.backbone.adapters.layer_adapters import add_bottlenecks, unfreeze_biases
from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.sites.bottleneck import Bottleneck, attach_bottleneck
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.common.errors import CheckpointError, ConfigError, DiskError

from ..conftest import Pairs, batch, disturb, whole_model

WITH_BIASES = ["qwen2", "gpt2", "opt", "opt_projected"]
WIDTH = 4


def make(method: str, model: Any, layers: Any) -> Any:
    if method == "bottleneck":
        add_bottlenecks(model, layers, WIDTH)
    elif method == "bitfit":
        unfreeze_biases(model, layers)
    elif method == "full":
        unfreeze_layers(model, layers)
    else:
        settings = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=list(layers), task_type="CAUSAL_LM")
        model = get_peft_model(model, settings)
    disturb(model)
    return model


def gradients(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model(**inputs, use_cache=False).loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.requires_grad}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert ours
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize(
    ("method", "family"),
    [("bottleneck", family) for family in CONFIGS] + [("bitfit", family) for family in WITH_BIASES],
)
def test_made_on_the_edge_it_loads_into_the_whole_model_and_trains_on(
    pairs: Pairs, tmp_path: Path, method: str, family: str
) -> None:
    pair = pairs(family)
    edge = make(method, pair.edge, pair.plan.edge_layers)
    inputs = batch("left_padded")
    logits = edge(**inputs).logits
    assert not torch.equal(logits, pair.whole(**inputs, use_cache=False).logits)
    save_adapter(edge, tmp_path / "adapter")
    whole = load_adapter(pair.whole, tmp_path / "adapter", trainable=True)
    assert torch.equal(whole(**inputs, use_cache=False).logits, logits)
    found = gradients(whole, inputs)
    assert_same(found, gradients(edge, inputs))
    assert all(float(value.abs().max()) > 0 for name, value in found.items() if "k_proj" not in name)

    again = load_adapter(pairs(family).edge, tmp_path / "adapter")
    assert torch.equal(again(**inputs).logits, logits)
    assert not [name for name, value in again.named_parameters() if value.requires_grad]
    info = json.loads((tmp_path / "adapter" / "isthmus_adapter.json").read_text())
    digest = Checkpoint(pair.folder, "x").digest()
    assert info == {
        "method": method,
        "layers": [0, 1, 4, 5],
        "model": pair.folder.name,
        "plan": "2:2",
        "digest": digest,
        **({"width": WIDTH} if method == "bottleneck" else {}),
    }


SITED: dict[str, Any] = {
    "lora": lambda targets: LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False),
    "rslora": lambda targets: LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", use_rslora=True),
    "vera": lambda targets: VeraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_weights=False),
    "loha": lambda targets: LoHaConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_weights=False),
}


@pytest.mark.parametrize("targets", [["q_proj"], r".*\.q_proj"])
@pytest.mark.parametrize("method", SITED)
def test_sites_that_are_switched_off_are_not_saved(pairs: Pairs, tmp_path: Path, method: str, targets: Any) -> None:
    pair = pairs("llama", num_hidden_layers=14, plan="1:1")  # a name of layer 1 opens one of layer 11
    model = get_peft_model(load_edge_parts(pair.folder, pair.plan, Sited()), SITED[method](targets))
    disturb(model)
    gate = model.get_base_model().remote_layers
    gate.live_sites = frozenset({"model.layers.2.self_attn.q_proj", "model.layers.11.self_attn.q_proj"})
    save_adapter(model, tmp_path / "some")
    kept = {name: value for name, value in model.state_dict().items() if _is_adapter(name)}
    info = json.loads((tmp_path / "some" / "adapter_config.json").read_text())
    left = {f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 2, 11, 13)}
    assert set(info["target_modules"]) == left
    saved = load_file(tmp_path / "some" / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.").partition(".q_proj.")[0] + ".q_proj" for name in saved} - left <= {
        "base_model.vera_A.q_proj",  # which all share
        "base_model.vera_B.q_proj",
    }
    whole = load_adapter(pair.whole, tmp_path / "some")
    theirs = {name: value for name, value in whole.state_dict().items() if _is_adapter(name)}
    assert theirs.keys() < kept.keys()
    assert not [name for name in theirs if not torch.equal(theirs[name], kept[name])]

    # The model itself is as before, and saves all of it when all of it acts.
    gate.live_sites = None
    save_adapter(model, tmp_path / "all")
    whole = load_adapter(pairs("llama", num_hidden_layers=14, plan="1:1").whole, tmp_path / "all")
    assert {name for name in whole.state_dict() if _is_adapter(name)} == kept.keys()
    assert json.loads((tmp_path / "all" / "adapter_config.json").read_text())["target_modules"] == targets


def _is_adapter(name: str) -> bool:
    return any(part in name for part in (".lora_", ".vera_", ".hada_"))


def test_a_configuration_is_itself_again_when_saving_fails(
    pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pairs("llama")
    model = get_peft_model(load_edge_parts(pair.folder, pair.plan, Sited()), SITED["lora"](["q_proj"]))
    model.get_base_model().remote_layers.live_sites = frozenset()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "adapter")

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(DiskError):
        save_adapter(model, tmp_path / "adapter")
    assert model.peft_config["default"].target_modules == {"q_proj"}
    assert not (tmp_path / "adapter").exists()


def test_bottlenecks_are_the_identity_at_their_start_and_learn(pairs: Pairs) -> None:
    pair, inputs = pairs("llama"), batch("no_mask")
    before = pair.edge(**inputs).logits
    add_bottlenecks(pair.edge, [0, 5], WIDTH)
    assert torch.equal(pair.edge(**inputs).logits, before)
    names = {name for name, value in pair.edge.named_parameters() if value.requires_grad}
    assert names == {
        f"model.layers.{layer}.bottleneck.{part}"
        for layer in (0, 5)
        for part in ("down.weight", "down.bias", "up.weight", "up.bias")
    }
    found = gradients(pair.edge, inputs)
    assert float(found["model.layers.0.bottleneck.up.weight"].abs().max()) > 0


def test_a_bottleneck_is_what_the_paper_says() -> None:
    block = Bottleneck(8, 3)
    nn.init.normal_(block.up.weight)
    hidden = torch.randn(2, 5, 8)
    inner = nn.functional.gelu(hidden @ block.down.weight.T + block.down.bias)
    torch.testing.assert_close(block(hidden), hidden + inner @ block.up.weight.T + block.up.bias)
    low = block(hidden.bfloat16())
    assert low.dtype == torch.bfloat16
    assert block.down.weight.dtype == torch.float32


def test_a_bottleneck_behind_a_module_that_returns_a_tuple() -> None:
    class Pairwise(nn.Module):
        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, str]:
            return hidden, "more"

    module, block = Pairwise(), Bottleneck(8, 3)
    nn.init.ones_(block.up.bias)
    attach_bottleneck(module, block)
    hidden, more = module(torch.zeros(1, 8))
    assert more == "more"
    assert torch.equal(hidden, torch.ones(1, 8))
    with pytest.raises(ConfigError, match="has a bottleneck adapter already"):
        attach_bottleneck(module, Bottleneck(8, 3))


def test_a_copied_model_uses_its_own_bottlenecks(pairs: Pairs) -> None:
    pair, inputs = pairs("gpt2"), batch("no_mask")
    add_bottlenecks(pair.edge, [0], WIDTH)
    before = pair.edge(**inputs).logits
    other = copy.deepcopy(pair.edge)
    disturb(other)
    assert torch.equal(pair.edge(**inputs).logits, before)
    assert not torch.equal(other(**inputs).logits, before)


def test_bottlenecks_generate(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama")
    edge = make("bottleneck", pair.edge, pair.plan.edge_layers)
    save_adapter(edge, tmp_path / "adapter")
    ids = batch("one_row", length=8)["input_ids"]
    whole = load_adapter(pair.whole, tmp_path / "adapter")
    ours, theirs = (model.generate(input_ids=ids, max_new_tokens=5, do_sample=False) for model in (edge, whole))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_a_family_without_biases(pairs: Pairs, family: str) -> None:
    with pytest.raises(ConfigError, match=rf"this {family} model have none: use method lora or bottleneck"):
        unfreeze_biases(pairs(family).edge, [0, 5])


@pytest.mark.parametrize("method", ["bottleneck", "bitfit", "full", "lora"])
def test_an_adapter_belongs_to_the_model_it_was_made_on(pairs: Pairs, tmp_path: Path, method: str) -> None:
    pair = pairs("qwen2")
    digest = Checkpoint(pair.folder, "x").digest()
    tuned = make(method, pair.edge, pair.plan.edge_layers)
    save_adapter(tuned, tmp_path / "a", record={"digest": digest, "plan": "2:2", "method": method})
    assert json.loads((tmp_path / "a" / "isthmus_tuning.json").read_text())["plan"] == "2:2"
    load_adapter(whole_model(pair.folder), tmp_path / "a", digest=digest)
    with pytest.raises(CheckpointError, match=r"tuned on a model with the digest .{16}, but this model's is 0000"):
        load_adapter(whole_model(pair.folder), tmp_path / "a", digest="0" * 64)


def test_what_is_trainable_after_loading_whole_layers(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama_tied")
    save_adapter(make("full", pair.edge, pair.plan.edge_layers), tmp_path / "a")
    whole = load_adapter(pair.whole, tmp_path / "a", trainable=True)
    names = [name for name, value in whole.named_parameters() if value.requires_grad]
    assert {name.split(".")[2] for name in names} == {"0", "1", "4", "5"}
    assert all(name.startswith("model.layers.") for name in names)
    load_adapter(whole, tmp_path / "a")
    assert not [name for name, value in whole.named_parameters() if value.requires_grad]


def test_the_method_and_the_digest_of_a_folder(pairs: Pairs, tmp_path: Path) -> None:
    for method in ("bottleneck", "bitfit", "full", "lora"):
        pair = pairs("qwen2")
        save_adapter(make(method, pair.edge, pair.plan.edge_layers), tmp_path / method)
        assert adapter_method(tmp_path / method) == method
    before = adapter_digest(tmp_path / "bitfit")
    path = tmp_path / "bitfit" / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    assert adapter_digest(tmp_path / "bitfit") != before
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"not an adapter \(adapter_config\.json is missing"):
        adapter_method(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="cannot read"):
        adapter_digest(tmp_path / "nowhere")


# Folders that do not fit ---------------------------------------------------------------------------------------------

NAME = "model.layers.0.bottleneck.down.weight"


def edit(name: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "isthmus_adapter.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return rewrite


def cut_short(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (edit("method", "lora"), r"damaged \(method 'lora'"),
        (edit("width", 0), "width 0"),
        (edit("width", 1 << 40), "width 1099511627776"),
        (edit("width", True), "width True"),
        (edit("layers", []), r"layers \[\]"),
        (edit("layers", [0, 0]), r"layers \[0, 0\]"),
        (edit("layers", [0, 1, 4, 2]), "adapter on layer 2, which this model lacks; it holds layers 0, 1, 4, 5"),
        (edit("layers", [0, 1, 4]), r"layers\.5\.bottleneck\.down\.bias, which this model has no place for"),
        (edit("width", 5), rf"has shape \[{WIDTH}, 32\] there and \[5, 32\] here"),
        (weights(lambda t: t.pop(NAME)), r"layers\.0\.bottleneck\.down\.weight, which is missing there"),
        (weights(lambda t: t.update(more=torch.ones(1))), "more, which this model has no place for"),
        (weights(lambda t: t.update({NAME: torch.ones(HIDDEN, WIDTH)})), r"shape \[32, 4\] there and \[4, 32\] here"),
        (weights(lambda t: t.update({NAME: t[NAME].int()})), "no floating point numbers"),
        (cut_short, r"adapter_model\.safetensors is damaged"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors is missing"),
        (lambda folder: (folder / "isthmus_adapter.json").write_text("{"), "cannot read"),
    ],
)
def test_a_folder_that_does_not_fit_leaves_the_model_as_it_was(
    pairs: Pairs, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    pair = pairs("llama")
    save_adapter(make("bottleneck", pair.edge, pair.plan.edge_layers), tmp_path / "a")
    spoil(tmp_path / "a")
    fresh = pairs("llama").edge
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_adapter(fresh, tmp_path / "a")
    assert_same(dict(fresh.state_dict()), before)


def test_biases_of_another_size_are_refused(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("qwen2")
    save_adapter(make("bitfit", pair.edge, pair.plan.edge_layers), tmp_path / "a")
    weights(lambda t: t.update({name: value[:-1].clone() for name, value in t.items()}))(tmp_path / "a")
    with pytest.raises(CheckpointError, match="has shape"):
        load_adapter(pairs("qwen2").edge, tmp_path / "a")


def test_only_biases_of_the_named_layers_are_written(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("gpt2")
    whole = AutoModelForCausalLM.from_pretrained(pair.folder)
    unfreeze_biases(whole, [0, 5])
    save_adapter(whole, tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert stored.keys() == whole.isthmus_adapter.parameters(whole).keys()
    # Two norms, attention in and out, MLP in and out, in two layers; learned positions and the final norm are outside.
    assert len(stored) == 12
    assert {name.split(".")[2] for name in stored} == {"0", "5"}
