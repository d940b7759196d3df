"""The work of `isthmus emulator build`: from a model's name to a signed package, resumable where it takes long."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers.pytorch_utils import Conv1D

from isthmus.backbone.checkpoints.sources import Checkpoint, load_tokenizer
from isthmus.backbone.families import family_of
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.skeleton import named_linears
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.backbone.split.span import load_span
from isthmus.common.errors import ConfigError, DataError
from isthmus.common.figures import plotting
from isthmus.common.files import check_replaceable, disk_errors, remove_folder
from isthmus.common.progress import bar
from isthmus.emulator.compress.bridges import LEAST_TOKENS_PER_INPUT
from isthmus.emulator.compress.emulator_model import Emulator, build_emulator
from isthmus.emulator.compress.public_text import load_blocks
from isthmus.emulator.compress.recipe import Recipe
from isthmus.emulator.distill.distillation import DistillConfig, distill
from isthmus.emulator.distill.loss_figure import loss_figure
from isthmus.emulator.distill.sampled_text import write_sample
from isthmus.emulator.package.build_presets import FOR_TUNING, BuildPreset
from isthmus.emulator.package.manifest import MAX_LICENCE, Quality
from isthmus.emulator.package.package import Package, is_package, write_package
from isthmus.emulator.package.plug_in import load_whole
from isthmus.protocol.secure.keys import WorkerIdentity
from isthmus.training.gradient_step import require_finite
from isthmus.training.logit_divergence import logit_divergence

OWN_TOKENS = 20_000  # that the model writes for a preset: some 30 for each input of a map of width 576
_SPARE = 2  # texts have fewer tokens than were written: special ones are left out
_HELD_OUT = 8  # blocks at most, and at most one in ten
_LOGIT_TOKENS = 512  # whose logits are held at a time


def build_package(
    out: Path,
    checkpoint: Checkpoint,
    plan: SplitPlan,
    recipe: Recipe,
    distillation: tuple[DistillConfig, Path | None] | None,
    *,
    signer: WorkerIdentity,
    licence: str,
    allow_draft_tuning: bool = False,
    adapters_below: bool = False,
    length: int,
    text: Path | None,
    figure: Path | None,
    device: str,
    preset: BuildPreset = FOR_TUNING,
) -> Package:
    """Build an emulator, distil it if there is a text for that, and write the signed package to `out`.

    The state of a distillation lies beside the package, in `<out>.distill`, and is removed once the package is written:
    the same call goes on where an interrupted one stopped.

    Args:
        signer: The worker's key and certificate.
        distillation: How to distil, and the public text for it, or None for that of the preset; None for no
            distillation.
        allow_draft_tuning: See `Manifest`, for `adapters_below` too.
        length: Tokens of a block of public text.
        text: Public text to choose layers and to fit bridges by; None for that of the distillation.
        figure: A PNG to draw the losses of the distillation to; None for none.
        device: `cpu`, `cuda`, or `auto` for a GPU if there is one.
        preset: With a name, the model writes the text itself where none is given; some of it is held out, to measure
            the package's quality on.

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
    place = pick_device(device)
    chosen_by = text or (distillation[1] if distillation else None)
    own_text = None
    if preset.name is not None and chosen_by is None:
        own_text = chosen_by = write_own_text(out, checkpoint, tokenizer, length, place)
    blocks = held_out = None
    if chosen_by and (recipe.needs_text or preset.name is not None):
        blocks = load_blocks(chosen_by, tokenizer, length)
    if blocks is not None and preset.name is not None:
        if len(blocks) < 2:
            raise DataError(f"the text {chosen_by} has one block of {length} tokens, none to hold out; give more text")
        n_held_out = min(_HELD_OUT, max(1, len(blocks) // 10))
        blocks, held_out = blocks[:-n_held_out], blocks[-n_held_out:]
    emulator = build_emulator(checkpoint, plan, recipe, blocks, device=place, ridge=preset.ridge)
    distilled = None
    state = out.with_name(f"{out.name}.distill")
    if distillation is not None:
        options, distil_text = distillation
        if blocks is None or held_out is None or distil_text not in (None, chosen_by):
            assert distil_text is not None  # noqa: S101  # only a preset has a text of its own, and then blocks of it
            blocks = load_blocks(distil_text, tokenizer, length)
        distilled = asdict(distill(checkpoint, plan, emulator, blocks, options, state))
        if figure is not None:
            loss_figure(state, figure)
    tuning = preset.tuning if preset.advised else None
    quality = None
    if held_out is not None and tuning is not None:
        emulator.quantize()  # what is measured is what is sent
        quality = measure_quality(checkpoint, plan, emulator, held_out, tuning.rank)
    is_preset = preset.makes(plan, recipe, distillation[0] if distillation else None)
    package = write_package(
        out,
        checkpoint,
        plan,
        emulator,
        signer=signer,
        licence=licence,
        distilled=distilled,
        allow_draft_tuning=allow_draft_tuning,
        preset=preset.name if is_preset else None,
        tuning=tuning if is_preset else None,
        quality=quality,
        adapters_below=adapters_below,
    )
    if own_text is not None:
        own_text.unlink()
    if distilled is not None:
        remove_folder(state)
    return package


def own_tokens(width: int, length: int) -> int:
    """How many tokens a model of this width writes: enough for its bridges beside the blocks that are held out."""
    return max(OWN_TOKENS, _SPARE * (LEAST_TOKENS_PER_INPUT * width + _HELD_OUT * length))


def write_own_text(beside: Path, checkpoint: Checkpoint, tokenizer: Any, length: int, device: str) -> Path:
    """Let the model write a preset's text, `<beside>.text-….jsonl`, unless an interrupted build has done it."""
    path = beside.with_name(f"{beside.name}.text-{checkpoint.digest()[:8]}-{length}.jsonl")
    if path.exists():
        return path
    unfinished = path.with_suffix(".part")
    tokens = own_tokens(checkpoint.config.hidden_size, length)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_sample(unfinished, load_whole(checkpoint).to(device), tokenizer, tokens, length=length)
        with disk_errors(path):
            unfinished.rename(path)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Stopped while the model wrote text; repeat the command to write it anew.") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def measure_quality(
    checkpoint: Checkpoint,
    plan: SplitPlan,
    emulator: Emulator,
    blocks: Tensor,
    rank: int,
    *,
    progress: Console | None = None,
) -> Quality:
    """Compare an emulator with the true middle, on text that it was not made with; see `Quality`.

    The gradients are those of LoRA's second factors on all linears of the edge's layers, at its start, where these
    are zero and the first factors are drawn: cross entropy of the next token.

    Args:
        blocks: Held-out text, `[n, length]`.
        rank: Of the LoRA.

    Raises:
        NonFiniteError: A figure is not finite.
    """
    device = emulator.device
    middle = load_span(checkpoint, plan, attn_implementation=emulator.attn_implementation).to(device)
    model: Any = load_edge_parts(checkpoint, plan, middle, attn_implementation=emulator.attn_implementation).to(device)
    model.requires_grad_(False)
    model.eval()
    layers = list(model.get_submodule(family_of(checkpoint.config).layers_path))
    generator = torch.Generator().manual_seed(0)
    sides = [
        [_start_lora(layer, rank, generator, device) for layer in part]
        for part in (layers[: plan.bottom], layers[len(layers) - plan.top :])
    ]
    below, above = ([factor for layer in side for factor in layer] for side in sides)
    factors = below + above
    gradients = [[torch.zeros_like(factor) for factor in factors] for _ in range(2)]
    kl = 0.0
    parts = torch.split(blocks.to(device), max(1, _LOGIT_TOKENS // blocks.shape[1]))
    with bar(progress, "measuring quality", len(parts)) as advance:
        for ids in parts:
            logits = []
            for span, sums in zip((emulator, middle), gradients, strict=True):
                model.remote_layers.span = span
                output = model(input_ids=ids, labels=ids, use_cache=False)
                for so_far, found in zip(sums, torch.autograd.grad(output.loss * len(ids), factors), strict=True):
                    so_far.add_(found)
                logits.append(output.logits.detach().flatten(0, 1))
            kl += logit_divergence(*logits).item() * len(ids) / len(blocks)
            advance()
    flat = [
        [
            torch.cat([torch.zeros(1, device=device), *(g.flatten() for g in part)])
            for part in (sums[: len(below)], sums[len(below) :])
        ]
        for sums in gradients
    ]
    cosines = [cosine_similarity(ours, theirs, dim=0).item() for ours, theirs in zip(*flat, strict=True)]
    for name, value in zip(("KL divergence", "gradient below", "gradient above"), (kl, *cosines), strict=True):
        require_finite(f"the emulator's {name} on held-out text is", value, "look at the model and the recipe.")
    lower, upper = (max(-1.0, min(1.0, cosine)) for cosine in cosines)
    return Quality(kl=max(0.0, kl), cosine_above=upper, cosine_below=lower, tokens=blocks.numel())


def _start_lora(layer: Any, rank: int, generator: torch.Generator, device: torch.device) -> list[Tensor]:
    """LoRA at its start on all linears of a layer; returns the second factors, which are zero."""
    factors = []
    for _, linear in named_linears(layer):
        weight: Any = linear.weight
        n_in, n_out = weight.shape if isinstance(linear, Conv1D) else weight.shape[::-1]
        down = (torch.randn(n_in, rank, generator=generator) / n_in**0.5).to(device)
        up = torch.zeros(rank, n_out, device=device, requires_grad=True)
        linear.register_forward_hook(lambda _l, x, y, down=down, up=up: y + x[0] @ down @ up)
        factors.append(up)
    return factors


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
