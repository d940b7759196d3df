"""The weights that an edge holds: where they come from, and how they are saved and loaded."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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


class EdgeWeightsSaving:
    """The part of the edge's model that writes its weights.

    Attributes:
        isthmus_origin: What the model was made of.
    """

    isthmus_origin: EdgeOrigin

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write what the edge holds, under the whole model's names; `load_edge_weights` puts it into a whole model.

        The folder has no `config.json`, so nothing takes it for a whole model. With adapters that transformers itself
        added (`add_adapter`), these are written instead, as transformers does.

        Args:
            save_directory: The folder; made if needed.
            is_main_process: Nothing is written where this is false.
            state_dict: What to write instead of the model's own state.
            push_to_hub: Refused.
            safe_serialization: Must be true: weights are written as safetensors only.
            **kwargs: Further arguments of transformers (sizes of shards, tokens for the hub) have no effect.

        Raises:
            DiskError: the disk is full or cannot be written.
            UnsupportedCallError: the state holds something else than the edge's tensors, such as an adapter's.
        """
        if push_to_hub or not safe_serialization:
            raise UnsupportedCallError("an edge's weights are written to a folder as safetensors; leave out the option")
        if getattr(self, "_hf_peft_config_loaded", False):
            cast(Any, super()).save_pretrained(
                save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs
            )
            return
        if is_main_process:
            state = cast(nn.Module, self).state_dict() if state_dict is None else state_dict
            save_edge_weights(self.isthmus_origin, state, Path(save_directory))
