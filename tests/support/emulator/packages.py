"""Packages of tiny models, adapters that were tuned on them, and clouds in memory that offer them."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch
from support.cloud.clouds import PLAN, served
from support.models.tiny import tiny_checkpoint
from support.protocol.wire import NOW, identity

from isthmus.backbone.adapters.adapter_files import save_adapter
from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.cloud.session.file_store import FileStore
from isthmus.cloud.session.handler import OfferedPackage
from isthmus.cloud.session.served_model import Served
from isthmus.cloud.session.tenant_adapters import AdapterStore
from isthmus.edge.config.training_config import TuneConfig
from isthmus.edge.training.methods import build_peft, trained
from isthmus.emulator.compress.emulator_model import build_emulator
from isthmus.emulator.compress.recipe import Recipe
from isthmus.emulator.package.manifest import Tuning
from isthmus.emulator.package.package import Package, write_package
from isthmus.protocol.messages import FileSet
from isthmus.protocol.secure.keys import WorkerIdentity


def tiny_package(
    folder: Path,
    model: Path,
    *,
    plan: str = PLAN,
    recipe: str = "uniform",
    keep: float = 0.5,
    signer: WorkerIdentity | None = None,
    allow_draft_tuning: bool = False,
    tuning: Tuning | None = None,
    adapters_below: bool = False,
    preset: str | None = None,
) -> Package:
    """Write a package of a tiny model, signed as the clouds of `support.cloud.memory_cloud` sign."""
    checkpoint = Checkpoint(model, "tiny")
    cut = SplitPlan.parse(plan, checkpoint.config.num_hidden_layers)
    emulator = build_emulator(checkpoint, cut, Recipe.parse(recipe, keep), None)
    now = time.time if signer is not None else lambda: float(NOW)
    return write_package(
        folder,
        checkpoint,
        cut,
        emulator,
        signer=signer or identity(),
        licence="for tests",
        allow_draft_tuning=allow_draft_tuning,
        tuning=tuning,
        adapters_below=adapters_below,
        preset=preset,
        now=now,
    )


def tuned(package: Package, out: Path, method: str = "lora", *, seed: int = 1, on_package: bool = True) -> Path:
    """Write an adapter whose every trained tensor has moved, as tuning on the package would, or split training."""
    values = {"package": package.folder, "data": "-", "out": out, "method": method, "steps": 10, "rank": 4}
    model = build_peft(package.load_model(), TuneConfig.model_validate(values), total_steps=10)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    record = {"digest": package.digest, "plan": str(package.plan), "method": method}
    save_adapter(model, out, record=record | {"package": package.id} if on_package else record)
    return out


class Owner:
    """A tiny model, its span, its parts and a package of it; clouds that offer them, each with adapters of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny_checkpoint("llama", folder / "model")
        self.plain = served(self.model, folder / "parts", max_tokens=256)
        self.package = tiny_package(folder / "package", self.model)
        self._adapters: dict[tuple[str, int, bool], Path] = {}

    def store(self, root: Path, *, package: bool = True) -> AdapterStore:
        info = self.plain.info
        return AdapterStore(
            root,
            self.folder / "parts",
            info.digest,
            SplitPlan.parse(info.plan, info.n_layers),
            self.plain.executor,
            max_tokens=info.limits.max_tokens_per_call,
            attn_implementation=info.attn_implementation,
            packages=[self.package.id] if package else [],
        )

    def offer(self, root: Path, *, package: bool = True) -> Served:
        offered = {"package": OfferedPackage(FileStore(self.package.folder, FileSet.EMULATOR), "")} if package else {}
        return dataclasses.replace(self.plain, adapters=self.store(root, package=package), packages=offered)

    def adapter(self, method: str = "lora", *, seed: int = 1, on_package: bool = True) -> Path:
        """An adapter, made once; copy it to change it."""
        key = (method, seed, on_package)
        if key not in self._adapters:
            out = self.folder / "-".join(map(str, key))
            self._adapters[key] = tuned(self.package, out, method, seed=seed, on_package=on_package)
        return self._adapters[key]
