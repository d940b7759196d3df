from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models.tiny import tiny_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from isthmus.backbone.adapters.adapter_files import load_adapter
from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import export_edge_parts
from isthmus.common.errors import AdapterError, PlanError
from isthmus.emulator.package.intake import check_adapter
from isthmus.emulator.package.plug_in import PLUGGED_FILE, export_plugged, plug_in

from .conftest import IDS, PLAN, WEIGHTS, Owner, change

CASES = [
    *(("llama", method) for method in ("lora", "dora", "ia3", "vera", "adalora", "prompt", "bottleneck", "full")),
    *(("gpt2", method) for method in ("lora", "dora", "bitfit", "bottleneck", "full")),
    ("gemma3_text", "lora"),
    ("llama_tied", "full"),
]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


# What fits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "method"), CASES)
def test_every_method_passes_and_is_plugged_into_the_full_middle(
    owners: Callable[[str], Owner], family: str, method: str
) -> None:
    owner = owners(family)
    adapter = owner.adapter(method)
    summary = owner.check(adapter)
    assert (summary.method, summary.package) == (method, owner.package.id)
    assert summary.size == sum(file.stat().st_size for file in adapter.iterdir())
    assert summary.n_params > 0

    model = plug_in(adapter, owner.package.folder, PLAN, owner.span)
    assert not model.training
    whole = AutoModelForCausalLM.from_pretrained(owner.checkpoint.folder, dtype=torch.float32).eval()
    before = logits(whole)
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), logits(load_adapter(whole, adapter).eval()))


@pytest.mark.parametrize(("family", "method"), [case for case in CASES if case[1] not in ("prompt", "bottleneck")])
def test_the_exported_model_computes_what_the_plugged_in_one_does(
    owners: Callable[[str], Owner], family: str, method: str, tmp_path: Path
) -> None:
    owner = owners(family)
    adapter = owner.adapter(method)
    assert export_plugged(adapter, owner.checkpoint, PLAN, tmp_path / "out") == "model"
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = logits(plug_in(adapter, owner.package.folder, PLAN, owner.span))
    if method in ("full", "bitfit"):
        assert torch.equal(logits(exported), expected)
    else:
        torch.testing.assert_close(logits(exported), expected, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a")["input_ids"]
    for file in (tmp_path / "out").glob("*.json"):
        assert str(owner.folder) not in file.read_text()


@pytest.mark.parametrize("method", ["bottleneck", "prompt"])
def test_what_is_no_weight_of_the_architecture_stays_an_adapter(llama: Owner, method: str, tmp_path: Path) -> None:
    adapter = llama.adapter(method)
    assert export_plugged(adapter, llama.checkpoint, PLAN, tmp_path / "out") == "adapter"
    reference = json.loads((tmp_path / "out" / PLUGGED_FILE).read_text())
    assert reference == {
        "model": "tiny-llama",
        "digest": llama.package.digest,
        "plan": "1:1",
        "method": method,
    }
    whole = AutoModelForCausalLM.from_pretrained(llama.checkpoint.folder, dtype=torch.float32).eval()
    restored = load_adapter(whole, tmp_path / "out" / "adapter").eval()
    assert torch.equal(logits(restored), logits(plug_in(adapter, llama.package.folder, PLAN, llama.span)))


def test_adalora_may_have_given_ranks_away(llama: Owner, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(llama.adapter("adalora"), tmp_path / "adapter"))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / WEIGHTS)
    name = min(name for name in tensors if name.endswith(".lora_E"))
    module = name.removesuffix(".lora_E")
    first = settings["init_r"]
    settings["rank_pattern"] = {name.removeprefix("base_model.model."): [True, False] * (first // 2)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(AdapterError, match="shape"):
        llama.check(adapter)
    tensors[f"{module}.lora_A"] = tensors[f"{module}.lora_A"][: first // 2].contiguous()
    tensors[f"{module}.lora_E"] = tensors[f"{module}.lora_E"][: first // 2].contiguous()
    tensors[f"{module}.lora_B"] = tensors[f"{module}.lora_B"][:, : first // 2].contiguous()
    save_file(tensors, adapter / WEIGHTS)
    assert llama.check(adapter).method == "adalora"
    assert logits(plug_in(adapter, llama.package.folder, PLAN, llama.span)).isfinite().all()


def test_an_adapter_made_by_split_training_names_no_package(llama: Owner, lora: Path, tmp_path: Path) -> None:
    record = llama.record("lora")
    del record["package"]
    (lora / "isthmus_tuning.json").write_text(json.dumps(record))
    export_edge_parts(llama.checkpoint, PLAN, tmp_path / "parts")
    assert check_adapter(lora, (), tmp_path / "parts", PLAN).package is None
    assert llama.check(lora).package is None


def test_another_plan_is_refused(llama: Owner, lora: Path) -> None:
    with pytest.raises(PlanError):
        check_adapter(lora, (llama.package.id,), llama.package.folder, SplitPlan(5, 1, 1))


# Plugging in ----------------------------------------------------------------------------------------------------------


def test_numbers_that_overflow_in_the_model_are_found_by_the_probe(llama: Owner, lora: Path) -> None:
    def enlarge(tensors: dict[str, Tensor], _: str) -> None:
        for tensor in tensors.values():
            tensor.fill_(3e38)

    change(lora, enlarge)
    llama.check(lora)
    with pytest.raises(AdapterError, match="NaN or infinity"):
        plug_in(lora, llama.package.folder, PLAN, llama.span)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_what_was_not_checked_still_gives_no_path_away(llama: Owner, lora: Path) -> None:
    def lose(tensors: dict[str, Tensor], name: str) -> None:
        del tensors[name]

    change(lora, lose)
    with pytest.raises(AdapterError, match="the adapter") as caught:
        plug_in(lora, llama.package.folder, PLAN, llama.span)
    assert str(lora) not in str(caught.value)


def test_an_adapter_of_another_model_is_not_exported(llama: Owner, lora: Path, tmp_path: Path) -> None:
    other = Checkpoint(tiny_checkpoint("llama", tmp_path / "other", seed=1), "other")
    with pytest.raises(AdapterError, match="digest"):
        export_plugged(lora, other, PLAN, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_names_a_layer_of_the_cloud_does_not_load(llama: Owner, lora: Path) -> None:
    settings = json.loads((lora / "adapter_config.json").read_text())
    settings["target_modules"].append("model.layers.3.self_attn.q_proj")
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(AdapterError, match=r"does not fit this model.*layers\.3\.self_attn\.q_proj"):
        plug_in(lora, llama.package.folder, PLAN, llama.span)


def test_a_prompt_longer_than_the_models_positions_cannot_run(owners: Callable[[str], Owner], tmp_path: Path) -> None:
    owner = owners("gpt2")
    adapter = Path(shutil.copytree(owner.adapter("prompt"), tmp_path / "adapter"))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"num_virtual_tokens": 130}))
    width = settings["token_dim"]
    save_file({"prompt_embeddings": torch.zeros(130, width)}, adapter / WEIGHTS)
    owner.check(adapter)
    with pytest.raises(AdapterError, match="cannot run with this adapter"):
        plug_in(adapter, owner.package.folder, PLAN, owner.span)
