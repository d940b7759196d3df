"""Files of tuned drafts: the weights of a package's emulator after a training run has gone on distilling it.

    draft.safetensors   each weight of the emulator once, fp32, by its name in `Emulator.tensors`; as metadata `format`,
                        `package` (the id of the package that it was tuned from), `steps` and `kl`

The file lies beside the adapter's folder. The package determines names and shapes; a file with others is refused before
a tensor is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from isthmus.common.errors import CheckpointError, PackageError
from isthmus.common.files import write_atomic
from isthmus.emulator.compress.emulator_model import Emulator

TUNED_DRAFT = "draft.safetensors"

_FORMAT = "isthmus tuned draft 1"
_MAX_HEADER = 1 << 20
_REMEDY = "remove it to draft with the package as it is, or train again"


def draft_weights(emulator: Emulator) -> dict[str, nn.Parameter]:
    """The weights of an emulator that are tuned, by name; not copies."""
    return {name: weight for name, weight in emulator.tensors().items() if isinstance(weight, nn.Parameter)}


def tuned_beside(adapter: Path | None) -> Path | None:
    """The tuned draft of the run that made an adapter's folder; None where there is none."""
    path = None if adapter is None else adapter.absolute().parent / TUNED_DRAFT
    return path if path is not None and path.is_file() else None


def save_tuned(path: Path, emulator: Emulator, package: str, *, steps: int, kl: float) -> None:
    """Write the weights of an emulator as a tuned draft.

    Args:
        package: Id of the package that it was tuned from.
        steps: Training steps that tuned it.
        kl: Mean KL divergence of the last steps, in nats.

    Raises:
        DiskError: The disk is full or cannot be written.
    """
    weights = {name: weight.detach().cpu().float().contiguous() for name, weight in draft_weights(emulator).items()}
    metadata = {"format": _FORMAT, "package": package, "steps": str(steps), "kl": f"{kl:.6g}"}
    write_atomic(path, save(weights, metadata))


def load_tuned(path: Path, emulator: Emulator, package: str) -> None:
    """Load the weights of a tuned draft into an emulator of the package.

    Args:
        package: Id of the package.

    Raises:
        CheckpointError: The file is missing or damaged, or its tensors are not the emulator's; the weights stay.
        PackageError: The draft was tuned from another package.
    """
    weights = draft_weights(emulator)
    most = 4 * sum(weight.numel() for weight in weights.values()) + _MAX_HEADER
    try:
        if (found := path.stat().st_size) > most:
            raise CheckpointError(f"{path} has {found} bytes, more than the {most} that its package allows: {_REMEDY}")
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise CheckpointError(f"{path} is no tuned draft, or one of another release: {_REMEDY}")
            if metadata.get("package") != package:
                raise PackageError(
                    f"{path} was tuned from the package {metadata.get('package', '')[:16]!r}, and this one is "
                    f"{package[:16]!r}: draft with the package that it was tuned from, or {_REMEDY}"
                )
            _check_forms(path, file, weights)
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in weights}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): {_REMEDY}") from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"tensor {name} in {path} is not finite: {_REMEDY}")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[name])


def _check_forms(path: Path, file: Any, weights: Mapping[str, Tensor]) -> None:
    names = set(file.keys())
    if names != weights.keys():
        name = min(names ^ weights.keys())
        raise CheckpointError(f"{path} {'has a strange' if name in names else 'lacks the'} tensor {name!r}: {_REMEDY}")
    for name, weight in weights.items():
        view = file.get_slice(name)
        if view.get_dtype() != "F32" or list(view.get_shape()) != list(weight.shape):
            raise CheckpointError(
                f"tensor {name} in {path} is {view.get_dtype()} {view.get_shape()}, and the package's is F32 "
                f"{list(weight.shape)}: {_REMEDY}"
            )
