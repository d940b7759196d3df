"""Checkpoints as the loops before `isthmus.training` wrote them, made of today's: the layouts are frozen here.

`rewrite_edge` and `rewrite_distillation` take what a run has saved and write it anew, file by file and key by key, as
the former loops of the edge (format 2) and of distillation (format 1) did.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any


def rewrite_edge(folder: Path, *, epoch: int, position: int, learning_rate: float) -> None:
    """A checkpoint of `edge train`, format 2."""
    state = json.loads((folder / "state.json").read_text())
    names = ["parameters.safetensors", "optimizer.safetensors", "method.safetensors", "random.safetensors"]
    _keep(folder, [*names, "losses.jsonl"])
    old: dict[str, Any] = {
        "format": 2,
        "step": state["step"],
        "epoch": epoch,
        "position": position,
        "learning_rate": learning_rate,
        "loss_before": state["loss_before"],
        "model": state["model"],
        "data": state["data"],
        "settings": state["settings"],
        "spent": state["spent"],
        "python_random": state["python_random"],
        "method_state": state["method_state"],
        "observers": state["observers"],
        "sha256": {name: _digest(folder / name) for name in [*names, "losses.jsonl"]},
    }
    entries = json.dumps(old, sort_keys=True, separators=(",", ":")).encode()
    old["own_sha256"] = hashlib.sha256(entries).hexdigest()
    (folder / "state.json").write_text(json.dumps(old, indent=1), encoding="utf-8")


def rewrite_distillation(folder: Path) -> None:
    """A checkpoint of a distillation, format 1."""
    state = json.loads((folder / "state.json").read_text())
    names = ["parameters.safetensors", "optimizer.safetensors", "distill.jsonl"]
    _keep(folder, names)
    old = {
        "format": 1,
        "step": state["step"],
        "settings": state["settings"],
        "error_before": state["error_before"],
        "sha256": {name: _digest(folder / name) for name in names},
    }
    (folder / "state.json").write_text(json.dumps(old, indent=2), encoding="utf-8")


def _keep(folder: Path, names: list[str]) -> None:
    copy = folder.with_name("older")
    copy.mkdir()
    for name in names:
        shutil.copy(folder / name, copy / name)
    shutil.rmtree(folder)
    copy.rename(folder)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
