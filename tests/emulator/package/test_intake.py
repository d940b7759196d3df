"""Returned adapters: whatever does not fit is refused before anything of it touches a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from isthmus.common.errors import AdapterError
from isthmus.emulator.package.intake import check_adapter

from .conftest import PLAN, WEIGHTS, Owner, change


def test_an_adapter_of_a_package_needs_one(llama: Owner, lora: Path) -> None:
    with pytest.raises(AdapterError, match="none is offered"):
        check_adapter(lora, (), llama.package.folder, PLAN)


@pytest.mark.parametrize(
    ("key", "value"), [("package", "00" * 32), ("package", 7), ("digest", "00" * 32), ("plan", "2:2"), ("digest", None)]
)
def test_an_adapter_of_something_else_is_refused(llama: Owner, lora: Path, key: str, value: Any) -> None:
    (lora / "isthmus_tuning.json").write_text(json.dumps(llama.record("lora") | {key: value}))
    with pytest.raises(AdapterError, match=key):
        llama.check(lora)


def test_an_adapter_that_does_not_say_what_it_was_tuned_on_is_refused(llama: Owner, lora: Path) -> None:
    (lora / "isthmus_tuning.json").unlink()
    with pytest.raises(AdapterError, match=r"isthmus_tuning\.json is missing.*isthmus emulator tune"):
        llama.check(lora)


@pytest.mark.parametrize(("method", "file"), [("full", "isthmus_edge.json"), ("bottleneck", "isthmus_adapter.json")])
def test_the_adapters_own_words_are_held_to_the_model_too(llama: Owner, tmp_path: Path, method: str, file: str) -> None:
    adapter = Path(shutil.copytree(llama.adapter(method), tmp_path / "adapter"))
    info = json.loads((adapter / file).read_text())
    (adapter / file).write_text(json.dumps(info | {"digest": "00" * 32}))
    with pytest.raises(AdapterError, match=file):
        llama.check(adapter)


@pytest.mark.parametrize("name", ["adapter_model.bin", "modeling.py", ".gitkeep", "tokenizer.json"])
def test_a_strange_file_is_refused(llama: Owner, lora: Path, name: str) -> None:
    (lora / name).write_text("")
    with pytest.raises(AdapterError, match=name):
        llama.check(lora)


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json", "isthmus_tuning.json", "README.md"])
def test_a_link_is_refused(llama: Owner, lora: Path, name: str) -> None:
    (lora / name).unlink()
    (lora / name).symlink_to(llama.adapter("lora") / name)
    with pytest.raises(AdapterError, match="not a plain file"):
        llama.check(lora)


def test_too_many_bytes_are_refused(llama: Owner, lora: Path) -> None:
    size = llama.check(lora).size
    assert llama.check(lora, max_bytes=size).size == size
    with pytest.raises(AdapterError, match=f"has {size} bytes"):
        llama.check(lora, max_bytes=size - 1)


def test_a_long_json_is_refused(llama: Owner, lora: Path) -> None:
    (lora / "adapter_config.json").write_text(" " * (300 << 10) + (lora / "adapter_config.json").read_text())
    with pytest.raises(AdapterError, match=r"adapter_config\.json has \d+ bytes"):
        llama.check(lora)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"peft_type": ' + "9" * 5000 + "}", "\0"])
@pytest.mark.parametrize("name", ["adapter_config.json", "isthmus_tuning.json"])
def test_a_json_that_is_none_is_refused(llama: Owner, lora: Path, name: str, text: str) -> None:
    (lora / name).write_text(text)
    with pytest.raises(AdapterError, match=name):
        llama.check(lora)


def test_two_kinds_at_once_are_refused(llama: Owner, lora: Path) -> None:
    shutil.copyfile(llama.adapter("full") / "isthmus_edge.json", lora / "isthmus_edge.json")
    with pytest.raises(AdapterError, match="this one has adapter_config"):
        llama.check(lora)


def test_weights_of_the_other_kind_are_refused(llama: Owner, lora: Path) -> None:
    shutil.copyfile(llama.adapter("full") / "model.safetensors", lora / "model.safetensors")
    with pytest.raises(AdapterError, match="weights belong into adapter_model"):
        llama.check(lora)


def test_an_empty_or_missing_folder_is_refused(llama: Owner, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="none of them"):
        llama.check(tmp_path)
    with pytest.raises(AdapterError, match="cannot be read"):
        llama.check(tmp_path / "nowhere")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["lora", "bottleneck", "full"])
def test_a_number_that_is_not_finite_is_refused_and_the_tensor_named(
    llama: Owner, tmp_path: Path, method: str, value: float
) -> None:
    adapter = Path(shutil.copytree(llama.adapter(method), tmp_path / "adapter"))

    def spoil(tensors: dict[str, Tensor], name: str) -> None:
        tensors[name].view(-1)[-1] = value

    name = change(adapter, spoil, "model.safetensors" if method == "full" else WEIGHTS)
    with pytest.raises(AdapterError, match=rf"^{name} holds NaN or infinity"):
        llama.check(adapter)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda tensors, name: tensors.update({name: tensors[name].T.contiguous()}), "has shape"),
        (lambda tensors, name: tensors.update({name: tensors[name][None]}), "has shape"),
        (lambda tensors, name: tensors.pop(name), "is missing"),
        (
            lambda tensors, name: tensors.update({name.replace("layers.0", "layers.3"): tensors[name].clone()}),
            "has no place",
        ),
        (lambda tensors, name: tensors.update({name: tensors[name].to(torch.float64)}), "of type F64"),
        (lambda tensors, name: tensors.update({name: tensors[name].to(torch.int8)}), "of type I8"),
    ],
)
@pytest.mark.parametrize("method", ["lora", "bottleneck", "full"])
def test_tensors_that_do_not_fit_are_refused(
    llama: Owner, tmp_path: Path, method: str, how: Callable[[dict[str, Tensor], str], None], message: str
) -> None:
    adapter = Path(shutil.copytree(llama.adapter(method), tmp_path / "adapter"))

    def apply(tensors: dict[str, Tensor], _: str) -> None:
        how(tensors, min(name for name, tensor in tensors.items() if tensor.dim() == 2 and "layers.0" in name))

    change(adapter, apply, "model.safetensors" if method == "full" else WEIGHTS)
    with pytest.raises(AdapterError, match=message):
        llama.check(adapter)


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 8, b"\xff" * 100, (1 << 40).to_bytes(8, "little"), (100).to_bytes(8, "little") + b"{}"]
)
def test_a_file_that_is_no_safetensors_is_refused(llama: Owner, lora: Path, data: bytes) -> None:
    (lora / WEIGHTS).write_bytes(data)
    with pytest.raises(AdapterError, match=WEIGHTS):
        llama.check(lora)


def test_a_truncated_file_is_refused(llama: Owner, lora: Path) -> None:
    (lora / WEIGHTS).write_bytes((lora / WEIGHTS).read_bytes()[:-4])
    with pytest.raises(AdapterError, match="damaged or truncated"):
        llama.check(lora)
