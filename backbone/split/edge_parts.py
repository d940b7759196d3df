"""The edge's part of a cut model: an ordinary transformers model whose middle layers are a function."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from isthmus.backbone.checkpoints.assembly import (
    build_on_meta,
    check_materialised,
    load_parameters,
    rebuild_buffers,
    tie_or_load,
)
from isthmus.backbone.checkpoints.sources import PARTS_FILE, Checkpoint, files_beside_the_weights
from isthmus.backbone.checkpoints.tensor_reader import EDGE_FILE, TensorReader, read_json, write_json
from isthmus.backbone.families import family_of, longest_sequence
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_model import RemoteLayers, SpanFn, edge_class
from isthmus.backbone.split.edge_weights import EdgeOrigin
from isthmus.common.errors import CheckpointError, IsthmusError, PlanError
from isthmus.common.files import disk_errors, new_folder

MAX_COPIES = 64
"""Most beams, or answers to one prompt, that a checkpoint's generation settings may ask for."""


def load_edge_parts(
    source: Checkpoint | Path,
    plan: SplitPlan,
    span: SpanFn,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> Any:
    """The edge's model: the family's own class, with the original layer indices, and the cloud's layers behind `span`.

    `model.model.layers` (or what the family calls it) has all the layers' places: the edge's are real, the first of
    the cloud's is a `RemoteLayers`, the others pass through, and their linears are skeletons. None of the cloud's has
    weights, so PEFT, Trainer and `generate` see a transformers model, and an adapter made on it loads into the whole
    model. `model.split_plan` and `model.remote_layers` tell about the cut.

    Args:
        source: A whole model's checkpoint, or what `export_edge_parts` wrote. Only the edge's tensors are read.
        plan: Who holds which layers.
        span: Runs the cloud's layers. See `SpanFn`: mask and positions come as the caller gave them to the model. A
            module is not registered: its weights are not the edge's.
        dtype: Floating point dtype of the edge's weights.
        attn_implementation: Attention implementation; None for the family's default. Both sides must use the same.

    Returns:
        A `PreTrainedModel` in eval mode.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete, or does not fit its configuration.
        ConfigError: the attention implementation does not fit the family.
        PlanError: the plan is for another number of layers, or the folder holds the parts of another plan.
        UnsupportedFamilyError: the architecture cannot be cut.
    """
    checkpoint = source if isinstance(source, Checkpoint) else _checkpoint(source)
    config = checkpoint.config
    _check_plan(checkpoint, config.num_hidden_layers, plan)
    family = family_of(config)
    model = build_on_meta(config, family, dtype, attn_implementation, edge_class)
    base = model.get_submodule(family.base)
    layers = getattr(base, family.layers)

    remote = RemoteLayers([layers[layer] for layer in plan.cloud], family.layers_path, plan.bottom, span)
    for layer in remote.layers:
        layers[layer.index] = layer

    names, tied = _load(model, checkpoint)
    _settle(model, checkpoint)
    model.isthmus_origin = EdgeOrigin(checkpoint, family, plan, names, tied)
    model.isthmus_parts = remote, base, family.layers
    model.isthmus_longest = longest_sequence(config)
    model.note_unwrapped()
    # Bound methods: a deep copy of the model binds them to the copy.
    base.register_forward_pre_hook(model.enter_forward, with_kwargs=True)
    base.register_forward_hook(model.leave_forward, always_call=True)
    return model


def export_edge_parts(
    checkpoint: Checkpoint, plan: SplitPlan, folder: Path, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write what an edge needs of a model, and nothing of the cloud's layers.

    The folder gets the configuration, the tokenizer's files and `edge.safetensors`: embedding, learned positions, the
    edge's layers, final norm and head, under their names in the whole model. It appears whole or not at all, and
    replaces an old one.

    Args:
        checkpoint: The whole model.
        plan: Who holds which layers.
        folder: Where to write.
        dtype: Floating point dtype of the written tensors.

    Raises:
        CheckpointError: the checkpoint is damaged or incomplete.
        DiskError: the disk is full or cannot be written.
        PlanError: the plan is for another number of layers.
        UnsupportedFamilyError: the architecture cannot be cut.
    """
    model = load_edge_parts(checkpoint, plan, _no_span, dtype=dtype)
    state = model.state_dict()
    tensors = {name: state[name].contiguous() for name in sorted(model.isthmus_origin.names)}
    info = {
        "model": checkpoint.name,
        "plan": str(plan),
        "digest": checkpoint.digest(),
        "revision": checkpoint.revision,
    }
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as new:
        for file in files_beside_the_weights(checkpoint.folder):
            shutil.copyfile(file, new / file.name)
        save_file(tensors, new / EDGE_FILE, metadata={"format": "pt"})
        write_json(new / PARTS_FILE, info)


class Weights(NamedTuple):
    """Bytes of weights: those that the edge holds, and the whole model's."""

    edge: int
    whole: int


def weigh_parts(checkpoint: Checkpoint, plan: SplitPlan) -> Weights:
    """What a model's weights take at fp32, going by `config.json` alone: nothing else has to be there.

    Tensors that are tied count twice, since a checkpoint may have them apart.

    Raises:
        CheckpointError: the configuration describes no model.
        PlanError: the plan is for another number of layers.
        UnsupportedFamilyError: the architecture cannot be cut.
    """
    try:
        config = checkpoint.config
        plan.check_layers(config.num_hidden_layers)
        model = build_on_meta(config, family_of(config), torch.float32, None)
    except IsthmusError:
        raise
    except Exception as error:  # a stranger's numbers: the classes fail at them in ways of their own
        raise CheckpointError(
            f"the configuration of {checkpoint.name} describes no model ({type(error).__name__}): fetch it again, or "
            "ask its owner"
        ) from error
    layers = model.get_submodule(family_of(config).layers_path)
    whole = _weight(model)
    return Weights(whole - sum(_weight(layers[layer]) for layer in plan.cloud), whole)


def _weight(module: Any) -> int:
    n_values: int = sum(tensor.numel() for tensor in module.state_dict(keep_vars=True).values())
    return 4 * n_values


def _checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, by the name of the model that exported parts were cut from."""
    checkpoint = Checkpoint(folder, folder.name)
    if checkpoint.is_edge_parts:
        return Checkpoint(folder, str(read_json(folder / PARTS_FILE).get("model", folder.name)))
    return checkpoint


def _no_span(hidden: torch.Tensor, _mask: torch.Tensor | None, _positions: torch.Tensor | None) -> torch.Tensor:
    return hidden


def _check_plan(checkpoint: Checkpoint, n_layers: int, plan: SplitPlan) -> None:
    plan.check_layers(n_layers)
    if checkpoint.is_edge_parts:
        cut = read_json(checkpoint.folder / PARTS_FILE).get("plan")
        if cut != str(plan):
            raise PlanError(f"{checkpoint.folder} holds an edge's parts for plan {cut}, not {plan}; use that plan")


def _load(model: Any, checkpoint: Checkpoint) -> tuple[frozenset[str], dict[str, str]]:
    """Fill the edge's model; returns its tensors' names and the tied ones."""
    reader = TensorReader(checkpoint.folder, prefix=model.base_model_prefix + ".")
    tied = tie_or_load(model, reader)
    load_parameters(model, "", reader, skip=frozenset(tied))
    rebuild_buffers(model)
    check_materialised(model)
    return frozenset(model.state_dict().keys() - tied.keys()), tied


def _settle(model: Any, checkpoint: Checkpoint) -> None:
    """What `from_pretrained` would do besides the weights, and no cache."""
    if (checkpoint.folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            path = checkpoint.folder / "generation_config.json"
            raise CheckpointError(f"{path} does not make sense; fetch the checkpoint again") from error
        for name in ("num_beams", "num_return_sequences"):  # each is another copy of the whole batch
            value = getattr(model.generation_config, name, None)
            if isinstance(value, int) and value > MAX_COPIES:
                raise CheckpointError(
                    f"{checkpoint.folder / 'generation_config.json'} has {name} = {value}, more than {MAX_COPIES}: "
                    "fetch the checkpoint again, or ask its owner"
                )
    model.generation_config.use_cache = None  # as the span allows
    model.config.use_cache = False
    model.config.name_or_path = str(checkpoint.folder)
    model.name_or_path = str(checkpoint.folder)
