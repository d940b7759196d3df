"""The edge's parts of a model, which the cloud sends: configuration and weights, until there is a model."""

from __future__ import annotations

import functools
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzz.target import Cursor, Target, block, scratch
from support.models.tiny import tiny_checkpoint

from isthmus.backbone.checkpoints import assembly, tensor_reader
from isthmus.backbone.checkpoints.sources import PARTS_FILE, Checkpoint
from isthmus.backbone.checkpoints.tensor_reader import EDGE_FILE, TensorReader, read_json
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split import edge_parts
from isthmus.backbone.split.edge_parts import export_edge_parts, load_edge_parts
from isthmus.common.errors import IsthmusError

PLAN = SplitPlan(3, 1, 1)
_CONFIG, _GENERATION = "config.json", "generation_config.json"


@functools.cache
def _folders() -> tuple[Path, Path, dict[str, Any]]:
    """The parts as they are, a folder for changed ones, and the configuration."""
    folder = scratch()
    model = Checkpoint(tiny_checkpoint("llama", folder / "model", num_hidden_layers=PLAN.n_layers), "tiny")
    export_edge_parts(model, PLAN, folder / "parts")
    return folder / "parts", folder / "changed", read_json(folder / "parts" / _CONFIG)


def _run(data: bytes) -> None:
    script = Cursor(data)
    whole, changed, config = _folders()
    flags, raw, tail = script.number(), script.block(), script.block()
    if not changed.exists():
        shutil.copytree(whole, changed)
    for name in (_CONFIG, PARTS_FILE, _GENERATION, EDGE_FILE):
        shutil.copyfile(whole / name, changed / name)
    match flags % 4:
        case 0:  # some of the values
            (changed / _CONFIG).write_bytes(_merged(config, raw))
        case 1:
            (changed / (PARTS_FILE, _CONFIG, _GENERATION)[flags // 4 % 3]).write_bytes(raw)
        case 2:
            (changed / _GENERATION).write_bytes(_merged(read_json(whole / _GENERATION), raw))
        case 3:  # another header over the same numbers
            content = (whole / EDGE_FILE).read_bytes()
            numbers = content[8 + int.from_bytes(content[:8], "little") :]
            (changed / EDGE_FILE).write_bytes(len(raw).to_bytes(8, "little") + raw + numbers + tail)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = load_edge_parts(changed, PLAN, lambda hidden, *_: hidden)
        except IsthmusError as error:
            str(error).encode(errors="backslashreplace")
            return
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise AssertionError("a model has tensors without numbers")


def _merged(values: dict[str, Any], raw: bytes) -> bytes:
    try:
        changes = json.loads(raw)
        return json.dumps(values | changes).encode(errors="surrogatepass")
    except (ValueError, TypeError, RecursionError):
        return raw


def _seeds() -> Iterator[bytes]:
    for changes in (
        {"num_attention_heads": 0},
        {"head_dim": 6},
        {"model_type": "gpt2"},
        {"num_hidden_layers": 4},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        {"hidden_act": "none", "tie_word_embeddings": True},
        {"layer_types": ["full_attention"], "attention_bias": True, "dtype": "float16"},
        {"vocab_size": -1, "pad_token_id": 999},
    ):
        yield b"\0" + block(json.dumps(changes).encode()) + block(b"")
    for flags, raw in ((1, b'{"plan": "1:1"}'), (1, b"{}"), (5, b"{}"), (9, b"[]"), (9, b'{"use_cache": 1}')):
        yield bytes((flags,)) + block(raw) + block(b"")
    yield b"\2" + block(b'{"max_length": "a", "do_sample": 3}') + block(b"")
    content = (_folders()[0] / EDGE_FILE).read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    yield b"\3" + block(header) + block(b"")
    yield b"\3" + block(header.replace(b"F32", b"I32", 1)) + block(b"")
    yield b"\3" + block(b"{}") + block(b"")


TARGET = Target(
    _run,
    _seeds,
    [load_edge_parts, edge_parts._checkpoint, edge_parts._check_plan, edge_parts._load, edge_parts._settle,
    assembly.build_on_meta,
     assembly.tie_or_load, assembly.load_parameters, TensorReader, tensor_reader.read_json],
    floor=0.75,
    max_len=4096,
    words=[f'"{name}": '.encode() for name in (
        "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "intermediate_size", "hidden_act",
        "max_position_embeddings", "rope_parameters", "rope_theta", "rope_type", "factor", "vocab_size",
        "tie_word_embeddings", "attention_bias", "mlp_bias", "pad_token_id", "initializer_range", "rms_norm_eps",
        "layer_types", "torch_dtype", "dtype", "quantization_config", "attn_implementation", "architectures",
    )],
)  # fmt: skip
