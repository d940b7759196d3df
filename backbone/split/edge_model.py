"""The class of the edge's model: its family's own class, with saving and generating fitted to what an edge holds."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.checkpoints.tensor_reader import WHOLE_FILE, TensorReader, read_json, write_json
from isthmus.backbone.families import Family
from isthmus.backbone.peft_checks import PeftChecks
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.sites.edge_sites import Site
from isthmus.backbone.split.remote_layers import RemoteLayers
from isthmus.common.errors import CheckpointError, UnsupportedCallError
from isthmus.common.files import disk_errors

EDGE_WEIGHTS_INFO = "isthmus_edge.json"

# generate() options that need a cache, or a layer's inner values.
_NEEDS_CACHE = ("cache", "past_key_values", "cache_implementation", "assistant_model", "prompt_lookup_num_tokens")


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


class EdgeModelMixin:
    """Stands before a transformers class in the edge model's bases; see `load_edge_parts`."""

    isthmus_origin: EdgeOrigin
    isthmus_checks: PeftChecks

    @property
    def split_plan(self) -> SplitPlan:
        """Who holds which layers."""
        return self.isthmus_origin.plan

    @property
    def remote_layers(self) -> RemoteLayers:
        """The module that calls the span."""
        origin = self.isthmus_origin
        path = f"{origin.family.layers_path}.{origin.plan.bottom}"
        return cast(RemoteLayers, cast(nn.Module, self).get_submodule(path))

    @property
    def layered_model(self) -> nn.Module:
        """The base model, whose forward loops over the layers."""
        return cast(nn.Module, self).get_submodule(self.isthmus_origin.family.base)

    def find_sites(self) -> Iterator[Site]:
        """The places inside the cloud's layers that carry an adapter, also those that are switched off."""
        return self.remote_layers.find_sites(self.layered_model)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, without a key-value cache: each new token runs the whole sequence through the span.

        Raises:
            UnsupportedCallError: an option needs a cache.
        """
        config = kwargs.get("generation_config")
        asked = kwargs.get("use_cache", getattr(config, "use_cache", None))
        if asked:
            raise UnsupportedCallError("the split model generates without a key-value cache; leave out use_cache=True")
        for name in _NEEDS_CACHE:
            if kwargs.get(name, getattr(config, name, None)) is not None:
                raise UnsupportedCallError(
                    f"generate({name}=…) needs a key-value cache, which the split model lacks; leave it out"
                )
        return cast(Any, super()).generate(*args, **{**kwargs, "use_cache": False})

    def check_adapters(self, *_: Any) -> None:
        """Make sure that PEFT's adapters compute what they would on the whole model.

        Runs when PEFT has wrapped the model and before each forward; an adapter that has passed is not looked at again.

        Raises:
            UnsupportedCallError: One would not.
        """
        self.isthmus_checks.check(self, getattr(self, "peft_config", {}))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "peft_config" and isinstance(value, dict):  # PEFT sets it once its layers are in place
            self.check_adapters()

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
            _save(self, Path(save_directory), state_dict)


def edge_class(model_class: type[Any]) -> type[Any]:
    """The edge's subclass of a transformers class, of the same name: configurations and PEFT go by it."""
    names = {"__module__": model_class.__module__, "__doc__": model_class.__doc__}
    return type(model_class.__name__, (EdgeModelMixin, model_class), names)


def _save(model: EdgeModelMixin, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
    origin = model.isthmus_origin
    state = cast(nn.Module, model).state_dict() if state_dict is None else state_dict
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
