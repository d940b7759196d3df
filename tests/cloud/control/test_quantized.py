"""A cloud whose backbone is quantized: what an edge computes with it, what it is told, and how it is served."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from support.cloud.clouds import Home, ThreadServer, served
from support.commands import in_process, refused
from support.models.dequantized_weights import noting
from support.models.tiny import N_LAYERS, tiny_checkpoint

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.checkpoints.span_format import PARTS
from isthmus.backbone.checkpoints.weight_quantization import QUANTIZERS
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.backbone.split.saved_span import save_span
from isthmus.backbone.split.span import SpanInput, load_span
from isthmus.cloud.control.serve_options import ServeOptions
from isthmus.cloud.control.worker_specs import Backbone, backbone_of
from isthmus.cloud.engine.executor import Executor
from isthmus.common.errors import ConfigError
from isthmus.edge import connect

pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed: pip install 'isthmus[quantize]'")

PLAN = SplitPlan.parse("2:2", N_LAYERS)
INPUTS = {"input_ids": torch.arange(3, 35).view(2, 16)}
INPUTS["labels"] = INPUTS["input_ids"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("quantized") / "model")


def gradients(model: Any, layers: list[int] | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients of a LoRA whose B is not zero."""
    torch.manual_seed(5)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=layers, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    loss = adapted(**INPUTS, use_cache=False).loss
    wanted = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_an_edge_computes_what_one_process_with_the_quantized_layers_computes(
    folder: Path, name: str, saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "saved"
    if saved:
        save_span(Checkpoint(folder, "tiny"), PLAN, place, dtype="fp32", quantizer=QUANTIZERS[name])
    cloud = served(folder, tmp_path / "parts", quantize=name, saved_span=place if saved else None)
    assert cloud.info.span_dtype == f"fp32+{name}"
    assert cloud.info.digest == Checkpoint(folder, "tiny").digest()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the cloud's
    try:
        with (
            ThreadServer(cloud, Home(tmp_path)) as server,
            connect(server.address, key=server.home.key_file) as link,
        ):
            found = gradients(link.load_model(), [0, 1, 4, 5])
            assert server.server.status()["span_bytes"] < 0.75 * 4 * cloud.executor.host.span.n_params
            with_sites = gradients(link.load_model(), [2, 3])
        span = load_span(folder, PLAN, quantizer=QUANTIZERS[name])
        expected = gradients(load_edge_parts(folder, PLAN, span), [0, 1, 4, 5])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[1], expected[1], strict=True))
    assert with_sites[0] != found[0]
    assert all(gradient.abs().max() > 0 for gradient in with_sites[1])


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_waiting_call_keeps_no_weights(folder: Path, name: str) -> None:
    kept = {}
    noted, weights = noting(QUANTIZERS[name])
    for quantizer in (None, noted):
        host = SiteHost(load_span(folder, PLAN, quantizer=quantizer))
        executor = Executor(host, torch.float32, 1 << 30)
        executor.forward(b"session", 1, SpanInput(torch.randn(1, 6, host.span.hidden_size)), keep=True)
        kept[quantizer] = executor.cache.used
    assert kept[noted] <= kept[None]
    assert executor.cache.used > 0
    gc.collect()
    assert weights
    assert not any(weight() is not None for weight in weights)


def chosen(
    model: Path, edge_layers: str | None = None, dtype: str | None = None, quantize: str | None = None
) -> Backbone:
    """What `serve` serves with these options."""
    options = ServeOptions(str(model), Path(), edge_layers=edge_layers, dtype=dtype, quantize=quantize)
    return backbone_of(options, Console(quiet=True))


def test_a_saved_span_is_served_as_it_was_made(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "saved"
    save_span(Checkpoint(folder, "tiny"), PLAN, place, dtype="bf16", quantizer=QUANTIZERS["nf4"])
    found = chosen(place)
    assert (found.checkpoint.name, str(found.plan), found.dtype, found.quantize) == ("tiny", "2:2", "bf16", "nf4")
    assert found.saved_span == str(place)
    assert found.parts == place / PARTS
    assert chosen(place, "2:2", "bf16", "nf4") == found
    for given, told in ((("1:1", None, None), "edge-layers 2:2"), ((None, "fp32", None), "dtype bf16"),
                        ((None, None, "none"), "quantize nf4")):  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            chosen(place, *given)


def test_what_makes_no_sense_is_refused(folder: Path) -> None:
    for dtype, quantize, told in (("fp8", None, "fp8"), (None, "int3", "int3")):
        with pytest.raises(ConfigError, match=told):
            chosen(folder, None, dtype, quantize)


def test_the_command_writes_what_serve_takes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "nf4"
    own = ("cloud", "quantize", "--model", folder, "--edge-layers", "2:2")
    done = in_process(capsys, *own, "--out", place, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["plan"], told["dtype"], told["quantize"]) == ("2:2", "bf16", "nf4")
    assert told["span_bytes"] < told["dense_bytes"]
    assert chosen(place).quantize == "nf4"
    done = in_process(capsys, *own, "--quantize", "int8", "--dtype", "fp32", "--out", tmp_path / "int8")
    assert f"{tmp_path / 'int8'}: layers 2:4 of model as int8" in done.stdout
    refused(in_process(capsys, *own, "--quantize", "none", "--out", place), 10, "--quantize none", "int8 or nf4")
    refused(in_process(capsys, *own, "--quantize", "int3", "--out", place), 10, "'int3'")
    refused(in_process(capsys, *own, "--dtype", "fp8", "--out", place), 10, "'fp8'")
    refused(in_process(capsys, *own[:2], "--model", folder, "--edge-layers", "3:3", "--out", place), 22, "3:3")


@pytest.mark.parametrize("name", QUANTIZERS)
def test_there_is_as_much_room_for_forward_states_as_without(folder: Path, name: str) -> None:
    span_bytes, state_bytes = set(), set()
    for quantizer in (None, QUANTIZERS[name]):
        host = SiteHost(load_span(folder, PLAN, quantizer=quantizer))
        executor = Executor(host, torch.float32, 1 << 30)
        executor.forward(b"session", 1, SpanInput(torch.randn(1, 6, host.span.hidden_size)), keep=True)
        span_bytes.add(executor.span_bytes)
        state_bytes.add(executor.cache.used)
    assert len(span_bytes) == len(state_bytes) == 1
