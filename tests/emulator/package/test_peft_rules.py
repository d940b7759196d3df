"""The options of a PEFT configuration that are taken from a stranger."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from isthmus.common.errors import AdapterError

from .conftest import Owner


@pytest.mark.parametrize(
    ("method", "option"),
    [("prompt", "num_virtual_tokens"), ("vera", "r"), ("lora", "task_type"), ("lora", "target_modules")],
)
def test_an_option_whose_default_is_out_of_range_must_be_there(
    llama: Owner, tmp_path: Path, method: str, option: str
) -> None:
    adapter = Path(shutil.copytree(llama.adapter(method), tmp_path / "adapter"))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    del settings[option]  # VeRA's rank is 256 then, more than the model is wide
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(AdapterError, match=f"names no {option}"):
        llama.check(adapter)


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "LOKR"},
        {"peft_type": None},
        {"peft_type": ["LORA"]},
        {"auto_mapping": {"base_model_class": "x", "parent_library": "os"}},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ".*"},
        {"target_modules": "all-linear"},
        {"target_modules": r"(.*\.)+x"},
        {"target_modules": r".*\.(0|3)\.(.*\.)?(q_proj)"},
        {"target_modules": []},
        {"target_modules": None},
        {"target_modules": ["q_proj"], "layers_to_transform": None},
        {"target_modules": ["model.layers.3.self_attn.q_proj"], "layers_to_transform": None},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["a|b"]},
        {"target_modules": ["no_such_module"]},
        {"layers_to_transform": [0, 3]},
        {"layers_to_transform": [0, 0]},
        {"layers_to_transform": 3},
        {"layers_pattern": "layers"},
        {"exclude_modules": ".*"},
        {"target_parameters": ["x"]},
        {"rank_pattern": {".*": 4}},
        {"alpha_pattern": {"(a+)+$": 4}},
        {"layer_replication": [[0, 4]]},
        {"init_lora_weights": "pissa"},
        {"loftq_config": {"loftq_bits": 4}},
        {"megatron_core": "os.path"},
        {"megatron_config": {"a": 1}},
        {"corda_config": {"a": 1}},
        {"trainable_token_indices": [1]},
        {"bias": "all"},
        {"r": 33},
        {"r": 0},
        {"r": True},
        {"r": 1 << 70},
        {"lora_alpha": 10**400},
        {"lora_alpha": "2"},
        {"lora_dropout": 1.5},
        {"task_type": "SEQ_CLS"},
        {"revision": "main"},
        {"base_model_name_or_path": "x" * 1000},
        {"an_option_of_the_future": 3},
    ],
    ids=str,
)
def test_an_option_that_training_does_not_set_is_refused(llama: Owner, lora: Path, changes: dict[str, Any]) -> None:
    settings = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(AdapterError, match=r"adapter_config\.json|PEFT's type|has no place|is missing"):
        llama.check(lora)


def test_an_option_that_is_off_does_no_harm(llama: Owner, lora: Path) -> None:
    settings = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(settings | {"revision": "0123456789" * 4}))
    assert llama.check(lora).method == "lora"  # a commit of the model, which says where it came from
    (lora / "adapter_config.json").write_text(json.dumps(settings | {"an_option_of_the_future": None}))
    assert llama.check(lora).method == "lora"


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "magic"},
        {"method": ["bitfit"]},
        {"width": 0},
        {"width": 33},
        {"width": 2.5},
        {"width": None},
        {"layers": [0, 3]},
        {"layers": []},
        {"layers": "0"},
        {"layers": [True]},
        {"plan": "2:2"},
    ],
    ids=str,
)
def test_a_bottleneck_that_does_not_fit_is_refused(llama: Owner, tmp_path: Path, changes: dict[str, Any]) -> None:
    adapter = Path(shutil.copytree(llama.adapter("bottleneck"), tmp_path / "adapter"))
    info = json.loads((adapter / "isthmus_adapter.json").read_text())
    (adapter / "isthmus_adapter.json").write_text(json.dumps(info | changes))
    with pytest.raises(AdapterError, match=r"isthmus_adapter\.json"):
        llama.check(adapter)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_virtual_tokens": 1 << 30},
        {"token_dim": 64},
        {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "some/model"},
    ],
    ids=str,
)
def test_a_prompt_that_does_not_fit_is_refused(llama: Owner, tmp_path: Path, changes: dict[str, Any]) -> None:
    adapter = Path(shutil.copytree(llama.adapter("prompt"), tmp_path / "adapter"))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        llama.check(adapter)


@pytest.mark.parametrize("settings", [{"alpha_pattern": []}, {"rank_pattern": None}, {"task_type": None}], ids=str)
def test_an_option_of_another_type_is_refused_before_peft_sees_it(
    llama: Owner, lora: Path, settings: dict[str, Any]
) -> None:
    written = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(written | settings))
    with pytest.raises(AdapterError, match=next(iter(settings))):
        llama.check(lora)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(" + "|".join(["0"] * 9) + r")\.(.*\.)?(k_proj|v_proj|down_proj)",
        r".*\.(0|00|5)\.(.*\.)?(k_proj|v_proj|down_proj)",
        r".*\.(0|5)\.(.*\.)?(" + "|".join(f"x{i}" for i in range(100)) + ")",
    ],
    ids=["repeated", "written in two ways", "many names"],
)
def test_a_pattern_that_takes_long_to_match_is_refused(llama: Owner, tmp_path: Path, pattern: str) -> None:
    adapter = Path(shutil.copytree(llama.adapter("ia3"), tmp_path / "adapter"))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": pattern}))
    with pytest.raises(AdapterError, match="target_modules"):
        llama.check(adapter)
