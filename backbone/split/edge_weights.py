"""The weights that an edge holds: where they come from, and how they are saved and loaded."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.checkpoints.tensor_reader import WHOLE_FILE, TensorReader, read_json, write_json
from isthmus.backbone.families import Family
from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import CheckpointError, UnsupportedCallError
from isthmus.common.files import disk_errors

EDGE_WEIGHTS_INFO = "isthmus_edge.json"


@dataclass(frozen=True, slots=True)
class EdgeOrigin:
    """What an edge's model was made of.

    Attributes:
        checkpoint: The checkpoint that was read.
        family: The model's family.
        plan: The split plan.
        names: The tensors of the edge, by their names in the whole model; a tied one counts once.
        tied: Name -> name of the tensor that it shares.
    """

    checkpoint: Checkpoint
    family: Family
    plan: SplitPlan
    names: frozenset[str]
    tied: dict[str, str]


def save_edge_weights(origin: EdgeOrigin, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the tensors that an edge holds, under the whole model's names.

    Args:
        origin: Of the edge's model.
        state: Its state.
        folder: Where to write; made if needed.

    Raises:
        DiskError: the disk is full or cannot be written.
        UnsupportedCallError: the state holds something else than the edge's tensors, such as an adapter's.
    """
    expected = origin.names | origin.tied.keys()
    strange = sorted(state.keys() - expected)
    missing = sorted(origin.names - state.keys())
    if strange or missing:
        raise UnsupportedCallError(
            f"the model's state is not the edge's own (for example {(strange or missing)[0]}); "
            "save the PEFT model, or merge it"
        )
    tensors = {name: state[name].detach().cpu().contiguous() for name in sorted(origin.names)}
    try:
        digest = origin.checkpoint.digest()
    except CheckpointError:
        digest = ""  # the checkpoint is gone; what was learned must not be lost with it
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as temporary:
            written = Path(temporary) / WHOLE_FILE
            save_file(tensors, written, metadata={"format": "pt"})
            written.replace(folder / WHOLE_FILE)
        write_json(
            folder / EDGE_WEIGHTS_INFO, {"model": origin.checkpoint.name, "plan": str(origin.plan), "digest": digest}
        )


def load_edge_weights(full_model: nn.Module, folder: Path) -> None:
    """Put what an edge model's `save_pretrained` wrote into the whole model, in place.

    Args:
        full_model: The whole model of the same architecture.
        folder: The folder.

    Raises:
        CheckpointError: the folder holds something else, or a name or a shape does not fit. The model is then
            unchanged.
    """
    read_json(folder / EDGE_WEIGHTS_INFO)
    reader = TensorReader(folder)
    state = full_model.state_dict(keep_vars=True)
    for name in reader:
        if name not in state:
            raise CheckpointError(
                f"the model has no tensor {name}, which {folder} holds; load the model that it was cut from"
            )
        if reader.view(name).shape != state[name].shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(reader.view(name).shape)} in {folder} and "
                f"{list(state[name].shape)} in the model; load the model that it was cut from"
            )
    with torch.no_grad():
        for name in reader:
            state[name].copy_(reader.view(name))
