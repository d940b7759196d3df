"""The work of `isthmus emulator build`: from a model's name to a signed package, resumable where it takes long."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

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
from isthmus.protocol.secure.keys import WorkerIdentity


def build_package(
    out: Path,
    checkpoint: Checkpoint,
    plan: SplitPlan,
    recipe: Recipe,
    distillation: tuple[DistillConfig, Path] | None,
    *,
    signer: WorkerIdentity,
    licence: str,
    allow_draft_tuning: bool = False,
    length: int,
    text: Path | None,
    figure: Path | None,
    device: str,
) -> Package:
    """Build an emulator, distil it if there is a text for that, and write the signed package to `out`.

    The state of a distillation lies beside the package, in `<out>.distill`, and is removed once the package is written:
    the same call goes on where an interrupted one stopped.

    Args:
        signer: The worker's key and certificate.
        distillation: How to distil, and the public text for it; None for no distillation.
        allow_draft_tuning: See `Manifest`.
        length: Tokens of a block of public text.
        text: Public text to choose layers and to fit bridges by; None for that of the distillation.
        figure: A PNG to draw the losses of the distillation to; None for none.
        device: `cpu`, `cuda`, or `auto` for a GPU if there is one.

    Raises:
        KeyboardInterrupt: The distillation was stopped; its message says where it is saved.
        CheckpointError: The model is damaged, or the state belongs to a distillation with other options.
        ConfigError: `out` exists and is no package, or an option does not make sense.
        DataError: A text is missing, malformed or too short.
        DiskError: The disk is full or cannot be written.
        NonFiniteError: The model or the distillation gives NaN or infinity.
        PlanError: The recipe leaves no layer.
    """
    check_free(out)
    if len(licence) > MAX_LICENCE:
        raise ConfigError(f"--licence has {len(licence)} characters; a manifest takes {MAX_LICENCE}: shorten it")
    if figure is not None:
        plotting()  # a missing package is an error before the long run, not after it
    recipe.layers_kept(len(plan.cloud))

    tokenizer = load_tokenizer(checkpoint.folder)
    chosen_by = text or (distillation[1] if distillation else None)
    blocks = load_blocks(chosen_by, tokenizer, length) if chosen_by and recipe.needs_text else None
    emulator = build_emulator(checkpoint, plan, recipe, blocks, device=pick_device(device))
    distilled = None
    state = out.with_name(f"{out.name}.distill")
    if distillation is not None:
        options, distil_text = distillation
        blocks = load_blocks(distil_text, tokenizer, length)
        distilled = asdict(distill(checkpoint, plan, emulator, blocks, options, state))
        if figure is not None:
            loss_figure(state, figure)
    package = write_package(
        out,
        checkpoint,
        plan,
        emulator,
        signer=signer,
        licence=licence,
        distilled=distilled,
        allow_draft_tuning=allow_draft_tuning,
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
