"""Files of tuned drafts: the weights of a package's emulator after a training run has gone on distilling it.

    draft.safetensors   each weight of the emulator once, fp32, by its name in `Emulator.tensors`; as metadata `format`
                        and `package` (the id of the package that it was tuned from)

The file lies beside the adapter's folder. The package determines names and shapes; a file with others is refused before
a tensor is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from isthmus.common.errors import CheckpointError, PackageError
from isthmus.common.files import write_atomic
from isthmus.emulator.compress.emulator_files import read_tensors
from isthmus.emulator.compress.emulator_model import Emulator

TUNED_DRAFT = "draft.safetensors"

_FORMAT = "isthmus tuned draft 1"
_MAX_HEADER = 1 << 20
_REMEDY = "remove it to draft with the package as it is, or train again"


def tuned_beside(adapter: Path | None) -> Path | None:
    """The tuned draft of the run that made an adapter's folder; None where there is none."""
    path = None if adapter is None else adapter.absolute().parent / TUNED_DRAFT
    return path if path is not None and path.is_file() else None


def save_tuned(path: Path, emulator: Emulator, package: str) -> None:
    """Write the weights of an emulator as a tuned draft.

    Args:
        package: Id of the package that it was tuned from.

    Raises:
        DiskError: The disk is full or cannot be written.
    """
    weights = {name: weight.detach().cpu().float().contiguous() for name, weight in emulator.weights().items()}
    write_atomic(path, save(weights, {"format": _FORMAT, "package": package}))


def load_tuned(path: Path, emulator: Emulator, package: str) -> None:
    """Load the weights of a tuned draft into an emulator of the package.

    Args:
        package: Id of the package.

    Raises:
        CheckpointError: The file is missing or damaged, or its tensors are not the emulator's; the weights stay.
        PackageError: The draft was tuned from another package.
    """

    def check(metadata: Mapping[str, str]) -> None:
        if metadata.get("format") != _FORMAT:
            raise CheckpointError(f"{path} is no tuned draft, or one of another release: {_REMEDY}")
        if metadata.get("package") != package:
            raise PackageError(
                f"{path} was tuned from the package {metadata.get('package', '')[:16]!r}, and this one is "
                f"{package[:16]!r}: draft with the package that it was tuned from, or {_REMEDY}"
            )

    weights = emulator.weights()
    most = 4 * sum(weight.numel() for weight in weights.values()) + _MAX_HEADER
    if path.is_file() and (found := path.stat().st_size) > most:
        raise CheckpointError(f"{path} has {found} bytes, more than the {most} that its package allows: {_REMEDY}")
    forms = {name: (tuple(weight.shape), torch.float32) for name, weight in weights.items()}
    tensors = read_tensors(path, forms, _REMEDY, check)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[name])
