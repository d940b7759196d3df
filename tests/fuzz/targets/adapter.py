"""A returned adapter as a whole: its folder's files, against a tiny model and plan."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fuzz.target import Cursor, Target, block, scratch
from fuzz.targets.adapter_settings import KINDS, settings
from fuzz.targets.adapter_tensors import _content
from support.models.tiny import tiny_checkpoint

from isthmus.backbone.adapters.adapter_files import PEFT_INFO, TUNING_INFO
from isthmus.backbone.adapters.custom_adapters import ADAPTER_WEIGHTS, CUSTOM_INFO
from isthmus.backbone.checkpoints.sources import PARTS_FILE, Checkpoint
from isthmus.backbone.checkpoints.tensor_reader import WHOLE_FILE, write_json
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import export_edge_parts
from isthmus.backbone.split.edge_weights import EDGE_WEIGHTS_INFO
from isthmus.common.errors import AdapterError
from isthmus.emulator.package import intake

PLAN = SplitPlan(6, 1, 1)
NAMED = {"digest": "00" * 32, "plan": str(PLAN)}
_INFOS = (PEFT_INFO, CUSTOM_INFO, EDGE_WEIGHTS_INFO)
_BOUND = 1 << 20


@functools.cache
def _parts() -> Path:
    folder = scratch()
    export_edge_parts(Checkpoint(tiny_checkpoint("llama", folder / "model"), "tiny"), PLAN, folder / "parts")
    (folder / "adapter").mkdir()
    write_json(folder / "parts" / PARTS_FILE, {"model": "tiny"} | NAMED)  # a digest that no release of torch changes
    return folder / "parts"


@functools.cache
def _model() -> Any:
    return intake._edge_on_meta(Checkpoint(_parts(), "tiny"), PLAN)


def _run(data: bytes) -> None:
    script, folder, model = Cursor(data), _parts().parent / "adapter", _model()
    for path in folder.iterdir():
        path.unlink()
    flags = script.number()
    info, tuning = script.block(), script.block()
    (folder / _INFOS[flags % 3]).write_bytes(info)
    (folder / TUNING_INFO).write_bytes(tuning or json.dumps(NAMED).encode())
    (folder / (WHOLE_FILE if flags % 3 == 2 else ADAPTER_WEIGHTS)).write_bytes(_content(script))
    # The model is built once: with it, an execution takes ten times as long.
    with patch.object(intake, "_edge_on_meta", lambda *_: copy.deepcopy(model)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of settings that make little sense
        try:
            summary = intake.check_adapter(folder, (), _parts(), PLAN, max_bytes=_BOUND, any_package=True)
        except AdapterError as error:
            str(error).encode(errors="backslashreplace")
            return
    there = sum(path.stat().st_size for path in folder.iterdir())
    if summary.size != there or not 0 <= summary.n_params * 2 <= there <= _BOUND:
        raise AssertionError(f"an adapter of {there} bytes was accepted as {summary}")


def _tensors(places: intake.Places) -> bytes:
    header, at = {}, 0
    for name, shape in places.items():
        size = 2
        for dim in shape:
            size *= dim
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    return b"\0" + block(raw)


def _seeds() -> Iterator[bytes]:
    for kind in KINDS:
        told = settings(kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            places = intake._peft_places(copy.deepcopy(_model()), told, PLAN)
        yield b"\0" + block(json.dumps(told).encode()) + block(b"") + _tensors(places)
    for own in ({"method": "bitfit", "layers": [0]}, {"method": "bottleneck", "layers": [0, 5], "width": 2}):
        places = intake._custom_places(copy.deepcopy(_model()), own, PLAN)
        yield b"\1" + block(json.dumps(own | NAMED).encode()) + block(b"") + _tensors(places)
    for own in ({"method": "bitfit", "layers": [2]}, {"method": "?", "layers": [0]}):
        yield b"\1" + block(json.dumps(own | NAMED).encode()) + block(b"")
    yield b"\2" + block(json.dumps(NAMED).encode()) + block(b"") + _tensors(intake._parts_places(_parts()))
    yield b"\2" + block(b"{}") + block(json.dumps(NAMED | {"package": "\ud800"}).encode())
    yield b"\0" + block(b"[" * 2000) + block(b"")
    yield b"\0" + block(b"[]") + block(b"")
    yield b"\0" + block(b"") + block(b"{}")
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    pattern = {f"{module.removeprefix('base_model.model.')}.lora_E": [True, False, True, False]}
    yield b"\0" + block(json.dumps(settings("ADALORA", rank_pattern=pattern)).encode()) + block(b"")
    yield b"\0" + block(json.dumps(settings("ADALORA", rank_pattern=[1])).encode()) + block(b"")
    for modules in (["lm_head"], ["none"]):
        yield b"\0" + block(json.dumps(settings("LORA", target_modules=modules)).encode()) + block(b"")


TARGET = Target(
    _run,
    _seeds,
    [intake],
    floor=0.75,
    max_len=8192,
    words=[
        b'"width": ',
        b'"layers": ',
        b'"method": ',
        b'"rank_pattern": ',
        b'"target_modules": ',
        b'"lm_head"',
        b'"embed_tokens"',
        b'"model.layers.0.mlp.up_proj"',
        b'"self_attn"',
        b'"package": ',
    ],
)
