"""An emulator's two files, which come in a package: what it is made of, and its weights."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzz.target import Cursor, Target, block, scratch
from fuzz.targets.edge_parts import _merged
from support.models.tiny import tiny_checkpoint, tiny_config

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.checkpoints.tensor_reader import read_json
from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import IsthmusError
from isthmus.emulator.compress import emulator_files
from isthmus.emulator.compress.emulator_files import load_emulator, save_emulator
from isthmus.emulator.compress.emulator_model import Emulator, build_emulator
from isthmus.emulator.compress.recipe import EMULATOR_FILE, EMULATOR_INFO, Recipe

PLAN = SplitPlan(4, 1, 1)
RECIPES = ("uniform", "uniform+int8", "uniform+lowrank:0.5+int4")


@functools.cache
def _folder() -> Path:
    folder = scratch()
    source = Checkpoint(tiny_checkpoint("llama", folder / "model", num_hidden_layers=PLAN.n_layers), "tiny")
    for number, recipe in enumerate(RECIPES):
        (folder / str(number)).mkdir()
        save_emulator(build_emulator(source, PLAN, Recipe.parse(recipe, 0.5), None), folder / str(number))
    (folder / "changed").mkdir()
    return folder


@functools.cache
def _config() -> Any:
    return tiny_config("llama", num_hidden_layers=PLAN.n_layers)


def _run(data: bytes) -> None:
    script = Cursor(data)
    flags, raw, header = script.number(), script.block(), script.block()
    whole, changed = _folder() / str(flags // 4 % len(RECIPES)), _folder() / "changed"
    for name in (EMULATOR_INFO, EMULATOR_FILE):
        shutil.copyfile(whole / name, changed / name)
    info = raw if flags & 1 else _merged(read_json(whole / EMULATOR_INFO), raw)
    if raw:
        (changed / EMULATOR_INFO).write_bytes(info)
    if flags & 2:
        content = (whole / EMULATOR_FILE).read_bytes()
        numbers = content[8 + int.from_bytes(content[:8], "little") :]
        (changed / EMULATOR_FILE).write_bytes(len(header).to_bytes(8, "little") + header + numbers)
    try:
        emulator = load_emulator(changed, _config())
    except IsthmusError as error:
        str(error).encode(errors="backslashreplace")
        return
    if not all(bool(tensor.isfinite().all()) for tensor in emulator.tensors().values()):
        raise AssertionError("an emulator's weights are not finite")


def _seeds() -> Iterator[bytes]:
    for kind in range(len(RECIPES)):
        yield bytes((4 * kind,)) + block(b"") + block(b"")
    for changes in (
        {"layers": [1, 2]},
        {"layers": [2, 1]},
        {"layers": []},
        {"layers": [9]},
        {"recipe": "uniform+bridged", "bridges": [0]},
        {"recipe": "uniform+bridged", "bridges": [2]},
        {"recipe": "crash", "layers": [1, 1]},
        {"recipe": "uniform+lowrank:0.001"},
        {"keep": 7, "more": 1},
        {"keep": "a"},
        {"keep": 10**400},
        {"format": 2},
    ):
        yield b"\0" + block(json.dumps(changes).encode()) + block(b"")
    content = (_folder() / "0" / EMULATOR_FILE).read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    for other in (header, header.replace(b"F32", b"I32", 1), header.replace(b"[32]", b"[33]", 1), b"{}"):
        yield b"\2" + block(b"") + block(other)


TARGET = Target(
    _run,
    _seeds,
    [
        load_emulator,
        emulator_files._read_info,
        emulator_files._bridges_fit,
        Emulator.stored_forms,
        emulator_files._weights,
        emulator_files.read_tensors,
        emulator_files._check_forms,
        Recipe.parse,
        Recipe.__post_init__,
    ],
    floor=0.85,
    max_len=4096,
    words=[b'"layers": ', b'"recipe": ', b'"bridges": ', b'"keep": ', b"+bridged", b"+lowrank:", b"+int8", b"crash"],
)
