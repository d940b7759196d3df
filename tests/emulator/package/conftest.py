"""A model owner with a package, and the adapters that a tenant returns."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.emulator.packages import tuned
from support.models.tiny import tiny_checkpoint
from torch import Tensor

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.span import load_span
from isthmus.emulator.compress.emulator_model import build_emulator
from isthmus.emulator.compress.recipe import Recipe
from isthmus.emulator.package.intake import check_adapter
from isthmus.emulator.package.package import Package, write_package
from isthmus.protocol.secure.keys import generate_root, issue_worker, load_worker

PLAN = SplitPlan(6, 1, 1)
IDS = torch.tensor([[5, 9, 33, 120, 7, 2]])
WEIGHTS = "adapter_model.safetensors"


class Owner:
    """A tiny model with a package of it, and adapters that were tuned on the package."""

    def __init__(self, family: str, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = Checkpoint(tiny_checkpoint(family, folder / "model"), f"tiny-{family}")
        generate_root(folder / "home")
        issue_worker(folder / "home")
        emulator = build_emulator(self.checkpoint, PLAN, Recipe.parse("uniform", 0.5), None)
        signer = load_worker(folder / "home")
        self.package: Package = write_package(
            folder / "package", self.checkpoint, PLAN, emulator, signer=signer, licence=""
        )
        self.span = load_span(self.checkpoint, PLAN)

    def adapter(self, method: str) -> Path:
        """An adapter whose every trained tensor has moved; made once."""
        out = self.folder / f"adapter-{method}"
        return out if out.exists() else tuned(self.package, out, method)

    def record(self, method: str) -> dict[str, str]:
        return {"package": self.package.id, "digest": self.package.digest, "plan": str(PLAN), "method": method}

    def check(self, adapter: Path, **options: Any) -> Any:
        return check_adapter(adapter, (self.package.id,), self.package.folder, PLAN, **options)


@pytest.fixture(scope="session")
def owners(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Owner]:
    made: dict[str, Owner] = {}

    def owner(family: str) -> Owner:
        if family not in made:
            made[family] = Owner(family, tmp_path_factory.mktemp(family))
        return made[family]

    return owner


@pytest.fixture(scope="session")
def llama(owners: Callable[[str], Owner]) -> Owner:
    return owners("llama")


@pytest.fixture
def lora(llama: Owner, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama.adapter("lora"), tmp_path / "adapter"))


@pytest.fixture(autouse=True)
def _peft_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        # It warns of adapters without a rank, which AdaLoRA makes.
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
        yield


def change(adapter: Path, how: Callable[[dict[str, Tensor], str], None], file: str = WEIGHTS) -> str:
    tensors = load_file(adapter / file)
    name = min(tensors)
    how(tensors, name)
    save_file(tensors, adapter / file)
    return name
