"""Quantized spans: near the real one, small in memory at any time, and the same from a file."""

from __future__ import annotations

import gc
import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models.dequantized_weights import noting
from support.models.tiny import HIDDEN, N_LAYERS, tiny_checkpoint
from torch import nn

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.checkpoints.span_format import INFO_FILE, NONE, PARTS, QUANTIZER_NAMES, is_saved_span, read_info
from isthmus.backbone.checkpoints.tensor_reader import SPAN_FILE, write_json
from isthmus.backbone.checkpoints.weight_quantization import (
    QUANTIZERS,
    QuantizedLinear,
    bytes_of,
    quantize_linears,
    quantizer_of,
    weight_of,
)
from isthmus.backbone.plan import Span, SplitPlan
from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.skeleton import named_linears
from isthmus.backbone.split import span as span_module
from isthmus.backbone.split.saved_span import load_saved_span, save_span
from isthmus.backbone.split.span import FrozenSpan, load_span
from isthmus.common.errors import CheckpointError, ConfigError

from ..conftest import Checkpoints

pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed: pip install 'isthmus[quantize]'")

PLAN = SplitPlan.parse("1:1", N_LAYERS)
BOUNDS = {"int8": 0.01, "nf4": 0.11}
"""Of the relative error of a weight: half a step of 127 for each output, and what NF4 has of a normal distribution."""


def linear(*, bias: bool = True) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(128, 96, bias=bias).requires_grad_(False)


def quantized(real: nn.Linear, name: str) -> QuantizedLinear:
    holder = nn.Sequential(real)
    quantize_linears(holder, QUANTIZERS[name])
    found = holder[0]
    assert isinstance(found, QuantizedLinear)
    return found


def hidden_states(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 20, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype)


def through(span: FrozenSpan, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and the gradient of the input for a fixed one of the output."""
    hidden = hidden_states(dtype).requires_grad_()
    output = span(hidden)
    (gradient,) = torch.autograd.grad(output, hidden, torch.ones_like(output))
    return output.detach(), gradient


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 128), (50, 96), (33, 41)])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_weight_is_near_the_real_one_and_smaller(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    real = nn.Linear(shape[1], shape[0], dtype=dtype).requires_grad_(False)
    small = quantized(real, name)
    assert small.weight.dtype == dtype
    assert distance(small.weight, real.weight) < BOUNDS[name]
    assert torch.equal(small.bias, real.bias)
    assert bytes_of(small) < bytes_of(real)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_output_and_gradient_are_those_of_the_dequantized_weight(name: str) -> None:
    small = quantized(linear(), name)
    plain = linear()
    plain.weight = nn.Parameter(small.weight, requires_grad=False)
    x = torch.randn(2, 7, 128, requires_grad=True)
    found, expected = small(x), plain(x)
    assert torch.equal(found, expected)
    upstream = torch.randn_like(found)
    (ours,), (theirs,) = (torch.autograd.grad(y, x, upstream) for y in (found, expected))
    assert torch.equal(ours, theirs)
    assert not any(parameter.requires_grad for parameter in small.parameters())


def test_nf4_is_bitsandbytes_own_layer_bit_for_bit() -> None:
    import bitsandbytes

    real = linear(bias=False)
    theirs = bitsandbytes.nn.Linear4bit(128, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    theirs.weight = bitsandbytes.nn.Params4bit(
        real.weight.detach().clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    theirs.to("cpu")
    ours = quantized(real, "nf4")
    x = torch.randn(3, 5, 128, requires_grad=True)
    outputs = [layer(x) for layer in (ours, theirs)]
    assert torch.equal(*outputs)
    assert torch.equal(*(torch.autograd.grad(output.sum(), x)[0] for output in outputs))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_graph_keeps_no_weight(name: str) -> None:
    small = quantized(linear(), name)
    x = torch.randn(1, 2, 128, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        small(x)
    assert sum(tensor.numel() for tensor in kept) < small.weight.numel()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_result_keeps_no_weight_in_any_other_way(name: str) -> None:
    """What a function puts into its context by itself passes no hook."""
    small = quantized(linear(), name)
    small.quantizer, weights = noting(small.quantizer)
    y = small(torch.randn(1, 2, 128, requires_grad=True))
    gc.collect()
    assert [weight() for weight in weights] == [None]
    y.sum().backward()
    gc.collect()
    assert [weight() for weight in weights] == [None, None]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "phi3", "qwen2"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_span_is_the_real_one_with_dequantized_weights(checkpoints: Checkpoints, family: str, name: str) -> None:
    folder = checkpoints(family)
    real, small = load_span(folder, PLAN), load_span(folder, PLAN, quantizer=QUANTIZERS[name])
    assert small.n_params == real.n_params
    before = through(real)
    quantized_linears = dict(named_linears(small.base))
    for path, plain in named_linears(real.base):
        module = quantized_linears[path]
        assert isinstance(module, QuantizedLinear)
        assert distance(weight_of(module), weight_of(plain)) < BOUNDS[name]
        weight_of(plain).copy_(weight_of(module))  # in place, also where it is turned
    for found, expected, exact in zip(through(small), through(real), before, strict=True):
        torch.testing.assert_close(found, expected)  # GPT-2's own product adds up in another order
        assert not torch.equal(found, exact)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_no_more_than_a_layer_is_in_full_precision_at_a_time(
    checkpoints: Checkpoints, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases: list[Any] = []
    full: list[int] = []
    build, load = span_module.empty_layers, span_module.load_parameters

    def built(*args: Any, **kwargs: Any) -> Any:
        bases.append(build(*args, **kwargs))
        return bases[-1]

    def loaded(*args: Any, **kwargs: Any) -> None:
        load(*args, **kwargs)
        layers = bases[-1].layers
        full.append(
            sum(
                any(linear.weight.device.type != "meta" for _, linear in named_linears(layer))
                for layer in layers
                if not any(isinstance(module, QuantizedLinear) for module in layer.modules())
            )
        )

    monkeypatch.setattr(span_module, "empty_layers", built)
    monkeypatch.setattr(span_module, "load_parameters", loaded)
    load_span(checkpoints("llama"), PLAN, quantizer=QUANTIZERS[name])
    assert full == [1] * len(PLAN.cloud)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize(("name", "dtype"), list(itertools.product(QUANTIZERS, ["fp32", "bf16"])))
def test_a_saved_span_is_the_same_bit_for_bit(
    checkpoints: Checkpoints, family: str, name: str, dtype: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(checkpoints(family), "tiny")
    folder = tmp_path / "saved"
    size, dense = save_span(checkpoint, PLAN, folder, dtype=dtype, quantizer=QUANTIZERS[name])
    loaded = load_saved_span(folder)
    torch_dtype = span_module.DTYPES[dtype]
    fresh = load_span(checkpoint, PLAN, dtype=torch_dtype, quantizer=QUANTIZERS[name])
    assert size == bytes_of(loaded)
    assert dense == load_span(checkpoint, PLAN, dtype=torch_dtype).n_params * torch_dtype.itemsize
    for found, expected in zip(through(loaded, torch_dtype), through(fresh, torch_dtype), strict=True):
        assert torch.equal(found, expected)
    assert is_saved_span(folder)
    assert Checkpoint(folder / PARTS, "tiny").digest() == checkpoint.digest()


def test_nothing_but_an_older_saved_span_is_replaced(checkpoints: Checkpoints, tmp_path: Path) -> None:
    model = Path(shutil.copytree(checkpoints("llama"), tmp_path / "model"))
    checkpoint, quantizer = Checkpoint(model, "tiny"), QUANTIZERS["int8"]
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "saved")
    for folder in (model, tmp_path, Path(), link):
        with pytest.raises(ConfigError, match="give another --out"):
            save_span(checkpoint, PLAN, folder, dtype="fp32", quantizer=quantizer)
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before
    for _ in range(2):
        save_span(checkpoint, PLAN, tmp_path / "saved", dtype="fp32", quantizer=quantizer)
    assert is_saved_span(tmp_path / "saved")


def test_a_part_of_a_saved_span_is_that_part_of_the_whole(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save_span(Checkpoint(checkpoints("llama"), "tiny"), PLAN, folder, dtype="fp32", quantizer=QUANTIZERS["nf4"])
    cut = PLAN.cloud.start + 1
    whole = load_saved_span(folder)
    first, second = (load_saved_span(folder, Span(*ends)) for ends in ((PLAN.cloud.start, cut), (cut, PLAN.cloud.stop)))
    assert max(bytes_of(first), bytes_of(second)) < bytes_of(whole)
    assert torch.equal(second(first(hidden_states())), whole(hidden_states()))
    with pytest.raises(CheckpointError, match=f"holds layers {PLAN.cloud}"):
        load_saved_span(folder, Span(0, 1))


def test_a_saved_span_holds_no_layer_of_the_edge_and_the_parts_none_of_the_cloud(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    save_span(Checkpoint(checkpoints("llama"), "tiny"), PLAN, folder, dtype="fp32", quantizer=QUANTIZERS["nf4"])
    layers = {int(name.split(".")[2]) for name in load_file(folder / SPAN_FILE)}
    assert layers == set(PLAN.cloud)
    parts = {name.split(".")[2] for name in load_file(folder / PARTS / "edge.safetensors") if ".layers." in name}
    assert parts == {"0", str(N_LAYERS - 1)}


def test_damaged_folders_are_told_by_name(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save_span(Checkpoint(checkpoints("llama"), "tiny"), PLAN, folder, dtype="fp32", quantizer=QUANTIZERS["int8"])
    tensors = load_file(folder / SPAN_FILE)
    name = next(name for name in tensors if name.endswith("q_proj.largest"))
    save_file({key: value for key, value in tensors.items() if key != name}, folder / SPAN_FILE)
    with pytest.raises(CheckpointError, match=r"q_proj\.largest"):
        load_saved_span(folder)
    save_file({**tensors, name: tensors[name][:-1].clone()}, folder / SPAN_FILE)
    with pytest.raises(CheckpointError, match=r"q_proj\.largest"):
        load_saved_span(folder)
    (folder / SPAN_FILE).write_bytes(b"\0" * 10)
    with pytest.raises(CheckpointError, match=SPAN_FILE):
        load_saved_span(folder)
    for wrong in ({}, {"dtype": 3}, {"dtype": "fp8"}):
        whole = {"model": "tiny", "plan": "1:1", "dtype": "fp32", "quantize": "nf4"}
        write_json(folder / INFO_FILE, whole | wrong if wrong else {})
        with pytest.raises(CheckpointError, match=INFO_FILE):
            read_info(folder)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_sites_find_their_linears_in_a_quantized_span(checkpoints: Checkpoints, name: str) -> None:
    folder = checkpoints("llama")
    real, small = SiteHost(load_span(folder, PLAN)), SiteHost(load_span(folder, PLAN, quantizer=QUANTIZERS[name]))
    assert small.groups == real.groups
    assert small.widest == real.widest


def test_what_cannot_be_quantized_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(QUANTIZERS) == QUANTIZER_NAMES
    assert quantizer_of(NONE) is None
    with pytest.raises(ConfigError, match=r"int4.*none, int8, nf4"):
        quantizer_of("int4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"isthmus\[quantize\]"):
        quantizer_of("nf4")


def test_an_old_folder_stays_where_writing_fails(tmp_path: Path, checkpoints: Checkpoints) -> None:
    folder = tmp_path / "saved"
    checkpoint = Checkpoint(checkpoints("llama"), "tiny")
    save_span(checkpoint, PLAN, folder, dtype="fp32", quantizer=QUANTIZERS["int8"])
    broken = Checkpoint(tiny_checkpoint("llama", tmp_path / "model"), "tiny")
    (broken.folder / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError):
        save_span(broken, PLAN, folder, dtype="fp32", quantizer=QUANTIZERS["nf4"])
    assert read_info(folder).quantize == "int8"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
