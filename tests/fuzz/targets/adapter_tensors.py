"""The safetensors file of a returned adapter: a header and numbers, against the names and shapes that must be there."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fuzz.target import Cursor, Target, block, scratch
from safetensors import safe_open

from isthmus.common.errors import AdapterError
from isthmus.emulator.package import intake

PLACES = {"a.weight": (2, 3), "b.bias": (4,), "empty": (0,)}


@functools.cache
def _file() -> Path:
    return scratch() / "adapter_model.safetensors"


def _run(data: bytes) -> None:
    _file().write_bytes(_content(Cursor(data)))
    try:
        count = intake._check_tensors(_file(), PLACES)
    except AdapterError as error:
        str(error).encode(errors="backslashreplace")
        return
    with safe_open(_file(), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != PLACES or count != 10:
        raise AssertionError("other tensors were accepted than have a place")
    for tensor in tensors.values():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise AssertionError("an accepted tensor is not finite")


def _content(script: Cursor) -> bytes:
    """A file: raw, or a header with its length before it, and as many numbers as it claims, if these are few."""
    if script.number() & 1:
        return script.rest()
    header, numbers = script.block(), script.rest()
    return struct.pack("<Q", len(header)) + header + numbers.ljust(min(_claimed(header), 1 << 12), b"\0")


def _claimed(header: bytes) -> int:
    try:
        values = json.loads(header).values()
        return max(int(value["data_offsets"][1]) for value in values if "data_offsets" in value)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError, OverflowError):
        return 0


def _header(**changes: Any) -> bytes:
    plain = {
        "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b.bias": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "empty": {"dtype": "F16", "shape": [0], "data_offsets": [32, 32]},
    }
    return json.dumps({name: value for name, value in (plain | changes).items() if value is not None}).encode()


def _seeds() -> Iterator[bytes]:
    yield b"\0" + block(_header())
    yield b"\0" + block(_header()) + struct.pack("<f", float("nan"))
    yield b"\0" + block(_header()) + bytes(24) + b"\x80\x7f"
    yield b"\0" + block(_header(more={"dtype": "F32", "shape": [0], "data_offsets": [32, 32]}))
    yield b"\0" + block(_header(empty=None))
    yield b"\0" + block(_header(empty={"dtype": "I8", "shape": [0], "data_offsets": [32, 32]}))
    yield b"\0" + block(_header(empty={"dtype": "F32", "shape": [0, 1], "data_offsets": [32, 32]}))
    yield b"\0" + block(_header(__metadata__={"format": "pt"}))
    yield b"\1" + struct.pack("<Q", 1 << 40) + b"{}"
    yield b"\1"


TARGET = Target(
    _run,
    _seeds,
    [intake._check_tensors],
    floor=0.9,
    max_len=1024,
    words=[
        b'"dtype":"',
        b'"shape":[',
        b'"data_offsets":[',
        b"F64",
        b"F8_E4M3",
        b"F8_E5M2",
        b"F4",
        b"BOOL",
        b"C64",
        b"__metadata__",
    ],
)
