"""The work of `isthmus emulator build`: from a model's name to a signed package, resumable where it takes long."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from isthmus.backbone.checkpoints.sources import Checkpoint, load_tokenizer
from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import ConfigError
from isthmus.common.figures import plotting
from isthmus.common.files import check_replaceable, remove_folder
from isthmus.emulator.compress.emulator_model import build_emulator
from isthmus.emulator.compress.public_text import load_blocks
from isthmus.emulator.compress.recipe import Recipe
from isthmus.emulator.distill.distillation import DistillConfig, distill
from isthmus.emulator.distill.loss_figure import loss_figure
from isthmus.emulator.package.manifest import MAX_LICENCE
from isthmus.emulator.package.package import Package, is_package, write_package
from isthmus.protocol.secure.keys import load_worker


@dataclass(frozen=True, slots=True)
class BuildConfig:
    """The options of `build_package`.

    Attributes:
        plan: Which layers are the edge's.
        recipe: Which of the others the emulator keeps, and how they are made smaller.
        licence: A note about what may be done with the package.
        home: The cloud's folder with `worker_key` and `worker_cert`.
        out: Where the package goes.
        length: Tokens of a block of public text.
        text: Public text to choose layers and to fit bridges by; None for that of the distillation.
        distil_text: Public text to distil on; None for no distillation.
        distil: Options of the distillation; None for none.
        figure: A PNG to draw the losses of the distillation to; None for none.
        device: Where to compute: `cpu`, `cuda`, or `auto` for a GPU if there is one.
    """

    plan: SplitPlan
    recipe: Recipe
    licence: str
    home: Path
    out: Path
    length: int = 256
    text: Path | None = None
    distil_text: Path | None = None
    distil: DistillConfig | None = None
    figure: Path | None = None
    device: str = "auto"


def build_package(checkpoint: Checkpoint, config: BuildConfig) -> Package:
    """Build an emulator, distil it if asked, and write the signed package.

    The state of a distillation lies beside the package, in `<out>.distill`, and is removed once the package is written:
    the same call goes on where an interrupted one stopped.

    Raises:
        KeyboardInterrupt: The distillation was stopped; its message says where it is saved.
        CheckpointError: The model is damaged, or the state belongs to a distillation with other options.
        ConfigError: `out` exists and is no package, or an option does not make sense.
        DataError: A text is missing, malformed or too short.
        DiskError: The disk is full or cannot be written.
        KeyFileError: The worker's key or certificate is missing or has expired.
        NonFiniteError: The model or the distillation gives NaN or infinity.
        PlanError: The recipe leaves no layer.
    """
    check_free(config.out)
    if len(config.licence) > MAX_LICENCE:
        raise ConfigError(f"--licence has {len(config.licence)} characters; a manifest takes {MAX_LICENCE}: shorten it")
    if config.figure is not None:
        plotting()  # a missing package is an error before the long run, not after it
    signer = load_worker(config.home)
    config.recipe.layers_kept(len(config.plan.cloud))

    tokenizer = load_tokenizer(checkpoint.folder)
    chosen_by = config.text or config.distil_text
    blocks = load_blocks(chosen_by, tokenizer, config.length) if chosen_by and config.recipe.needs_text else None
    emulator = build_emulator(checkpoint, config.plan, config.recipe, blocks, device=pick_device(config.device))
    distilled: dict[str, Any] | None = None
    state = config.out.with_name(f"{config.out.name}.distill")
    if config.distil is not None and config.distil_text is not None:
        text = load_blocks(config.distil_text, tokenizer, config.length)
        report = distill(checkpoint, config.plan, emulator, text, config.distil, state)
        distilled = report.summary()
        if config.figure is not None:
            loss_figure(state, config.figure)
    package = write_package(
        config.out,
        checkpoint,
        config.plan,
        emulator,
        signer=signer,
        licence=config.licence,
        distilled=distilled,
    )
    if distilled is not None:
        remove_folder(state)
    return package


def check_free(out: Path) -> None:
    """Make sure that a package may be written to `out`.

    Raises:
        ConfigError: Something else is there, if only a link to a package; or the path ends in no name.
    """
    check_replaceable(out, is_package, "package")


def pick_device(name: str) -> str:
    """`cpu` or `cuda`, as `--device` says.

    Raises:
        ConfigError: It says something else, or there is no GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {name!r} is not known; use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no GPU that torch can use; use cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"
