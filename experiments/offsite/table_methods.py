"""The emulators of a table: what a method's name means, and how its emulator is built once and kept."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.checkpoints.tensor_reader import read_json
from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import ConfigError
from isthmus.common.files import locked, new_folder, remove_folder, sha256_of, write_atomic
from isthmus.emulator.compress.emulator_files import load_emulator, save_emulator
from isthmus.emulator.compress.emulator_model import Emulator, build_emulator
from isthmus.emulator.compress.layer_choice import Measures
from isthmus.emulator.compress.layer_measures import measure
from isthmus.emulator.compress.public_text import fingerprint, load_blocks
from isthmus.emulator.compress.recipe import EMULATOR_FILE, EMULATOR_INFO, Recipe
from isthmus.emulator.distill.distillation import DistillConfig, distill

DISTILLED = "+distilled"


@dataclass(frozen=True, slots=True)
class Method:
    """A way to make an emulator.

    Attributes:
        label: What the table calls it: `importance+distilled`, or the name of a given emulator's folder.
        recipe: Which layers are kept, and how they are made smaller; None for a given emulator.
        given: Folder of an emulator or of a package that exists already; None for one to build.
    """

    label: str
    recipe: Recipe | None
    distilled: bool = False
    given: Path | None = None

    @classmethod
    def parse(cls, text: str, keep: float) -> Method:
        """The method that a flag names: a recipe, one with `+distilled` at its end, or an emulator's folder.

        Raises ConfigError where it is neither.
        """
        folder = Path(text)
        if (folder / EMULATOR_INFO).is_file():
            return cls(folder.resolve().name, None, given=folder)
        if text in ("", ".") or "/" in text:
            raise ConfigError(f"{text!r} is no method and no emulator's or package's folder: check the path")
        return cls(text, Recipe.parse(text.removesuffix(DISTILLED), keep), text.endswith(DISTILLED))


@dataclass(frozen=True, slots=True)
class Built:
    """An emulator on the disk.

    Attributes:
        keep: Share of the middle's layers that it keeps.
        sha256: Of its weights' file, hex: the row of a table names it, and a package's manifest has the same.
    """

    label: str
    keep: float
    folder: Path
    sha256: str

    def load(self, checkpoint: Checkpoint, device: str) -> Emulator:
        """A fresh copy, frozen."""
        return load_emulator(self.folder, checkpoint.config, device=device)


@dataclass(frozen=True, slots=True)
class Workshop:
    """Builds emulators into `folder` and finds those that are there.

    Attributes:
        text: Public text to choose layers by, to fit bridges and to distil on.
    """

    folder: Path
    checkpoint: Checkpoint
    plan: SplitPlan
    tokenizer: Any
    text: Path
    length: int
    options: DistillConfig
    device: str

    def check(self, method: Method) -> None:
        """Make sure that it can be built, before hours of other work.

        Raises:
            DataError: The method needs text, and there is none.
            PlanError: It keeps no layer.
        """
        if method.recipe is None:
            return
        method.recipe.layers_kept(len(self.plan.cloud))
        if method.distilled or method.recipe.needs_text:
            load_blocks(self.text, self.tokenizer, self.length)

    def build(self, method: Method, console: Console) -> Built:
        """The method's emulator, built if it is not there; an interrupted distillation goes on.

        Raises KeyboardInterrupt where the distillation was stopped and saved.
        """
        if method.given is not None:
            recipe_keep = float(json.loads((method.given / EMULATOR_INFO).read_text(encoding="utf-8"))["keep"])
            return Built(method.label, recipe_keep, method.given, sha256_of(method.given / EMULATOR_FILE).hex())
        assert method.recipe is not None  # noqa: S101  # a method that is not given has one
        recipe = method.recipe
        needs_text = method.distilled or recipe.needs_text
        blocks = load_blocks(self.text, self.tokenizer, self.length) if needs_text else None
        made_of = {
            "model": self.checkpoint.digest(),
            "plan": str(self.plan),
            "recipe": str(recipe),
            "keep": recipe.keep,
            "text": None if blocks is None else fingerprint(blocks),
            "distilled": self.options.stated() if method.distilled else None,
        }
        mark = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:8]
        folder = self.folder / f"{method.label.replace(':', '')}-{recipe.keep:g}-{mark}"
        with locked(folder):  # two tables may share what they build
            if not folder.exists():
                console.print(f"building {method.label}, keep {recipe.keep:g}", markup=False)
                self._make(method, recipe, blocks, folder, console)
        return Built(method.label, recipe.keep, folder, sha256_of(folder / EMULATOR_FILE).hex())

    def _make(self, method: Method, recipe: Recipe, blocks: Tensor | None, folder: Path, console: Console) -> None:
        measures = None if blocks is None or not recipe.chooses_by_text else self._measures(recipe, blocks, console)
        emulator = build_emulator(
            self.checkpoint, self.plan, recipe, blocks, device=self.device, progress=console, measures=measures
        )
        state = folder.with_name(f"{folder.name}.distill")
        if method.distilled and blocks is not None:
            distill(self.checkpoint, self.plan, emulator, blocks, self.options, state, progress=console)
        with new_folder(folder) as temporary:
            save_emulator(emulator, temporary)
        if state.exists():
            remove_folder(state)

    def _measures(self, recipe: Recipe, blocks: Tensor, console: Console) -> Measures:
        """What the layers do to the text; what is known of it is kept, since a removal order takes minutes."""
        made_of = f"{self.checkpoint.digest()} {self.plan} {fingerprint(blocks)}"
        path = self.folder / f"measures-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}.json"
        with locked(path):
            known = _read_measures(path) if path.is_file() else Measures(())
            n_removed = len(self.plan.cloud) - recipe.layers_kept(len(self.plan.cloud))
            orders = {"importance": known.removed, "kl": known.removed_by_kl}
            order = orders.get(recipe.selection)
            enough = known.similarity if order is None else len(order) >= n_removed
            if not enough:
                known = measure(
                    self.checkpoint, self.plan, recipe, blocks, device=self.device, progress=console, known=known
                )
                write_atomic(path, json.dumps(asdict(known)).encode())
            return known


def _read_measures(path: Path) -> Measures:
    kept = read_json(path)
    return Measures(
        tuple(kept["influence"]),
        tuple(kept["removed"]),
        tuple(kept["removal_errors"]),
        tuple(map(tuple, kept["similarity"])),
        tuple(kept.get("removed_by_kl", ())),
        tuple(kept.get("removal_kl", ())),
    )
