"""Build a model without weights, put parts of a checkpoint into it, and nothing else into memory.

The architecture is built on torch's meta device, where a tensor has a shape and no storage. What a party does not
hold is taken out; what it holds is read tensor by tensor. So the peak is what is kept plus one tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from isthmus.backbone.checkpoints.sources import SENSELESS
from isthmus.backbone.checkpoints.tensor_reader import TensorReader
from isthmus.backbone.families import Family
from isthmus.common.errors import CheckpointError, ConfigError, UnsupportedFamilyError
from isthmus.kernels.dispatch import DTYPES


def build_on_meta(
    config: Any,
    family: Family,
    dtype: torch.dtype,
    attn_implementation: str | None,
    subclass: Callable[[type[Any]], type[Any]] = lambda model_class: model_class,
) -> Any:
    """The whole language model of `config` on the meta device, with a configuration of its own, in eval mode.

    Args:
        attn_implementation: Attention implementation; None for the family's default.
        subclass: Makes the class to build of the family's own.

    Raises:
        CheckpointError: the configuration describes no model.
        ConfigError: `dtype` is not a dtype for weights, or the attention implementation does not fit the family.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"weights cannot be {dtype}; use one of {', '.join(str(known) for known in DTYPES)}")
    attention = family.attention(attn_implementation)
    try:
        model_class = subclass(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
        with torch.device("meta"):
            model = model_class._from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)
    except SENSELESS as error:  # no head at all, for one
        raise CheckpointError(f"the model's configuration does not make sense ({error}); fetch it again") from error
    return model.eval()


def load_parameters(module: nn.Module, prefix: str, reader: TensorReader, skip: frozenset[str] = frozenset()) -> None:
    """Read every parameter and persistent buffer of `module` that is still on the meta device.

    Args:
        prefix: What precedes the module's own names in the whole model, such as `"model.layers.3."`.
        skip: Names in the whole model to leave alone.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    for name, empty in module.state_dict(keep_vars=True).items():
        if empty.device.type == "meta" and prefix + name not in skip:
            _assign(module, name, reader.read(prefix + name, empty.shape, empty.dtype))


def tie_or_load(model: Any, reader: TensorReader) -> dict[str, str]:
    """Load and tie the tensors that the configuration says are one, as transformers' own loading does.

    A checkpoint may hold one of the two or both. Two different ones are kept apart, and the configuration is
    corrected, so that nothing ties them later.

    Returns:
        Tied name -> name that it is tied to.

    Raises:
        CheckpointError: neither of the two is in the checkpoint, or a shape does not fit.
    """
    tied: dict[str, str] = {}
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        empty = model.get_parameter(source)
        stored = source if source in reader else target
        value = reader.read(stored, empty.shape, empty.dtype)
        _assign(model, source, value)
        if stored == source and target in reader:
            other = reader.read(target, empty.shape, empty.dtype)
            if not torch.equal(other, value):
                _assign(model, target, other)
                model.config.tie_word_embeddings = False
                model.all_tied_weights_keys.pop(target, None)
                continue
            del other
        tied[target] = source
    model.tie_weights()
    return tied


def rebuild_buffers(module: nn.Module) -> None:
    """Compute the buffers that no checkpoint holds: rotary frequencies, and the embedding's scale in Gemma.

    Raises:
        CheckpointError: the configuration describes no rotary embedding.
        UnsupportedFamilyError: the architecture has a buffer of a kind that is not known here.
    """
    for path, part in list(module.named_modules()):
        empty = [name for name, buffer in part.named_buffers(recurse=False) if buffer.device.type == "meta"]
        if not empty:
            continue
        if type(part).__name__.endswith("RotaryEmbedding"):
            try:
                fresh = type(part)(config=part.config)
            except SENSELESS as error:
                raise CheckpointError(
                    f"the model's rotary embedding does not make sense ({error}); fetch its configuration again"
                ) from error
            for name in empty:
                setattr(part, name, getattr(fresh, name))
        elif empty == ["embed_scale"]:
            part.embed_scale = torch.tensor(part.scalar_embed_scale, dtype=part.embed_scale.dtype)
        else:
            raise UnsupportedFamilyError(f"cannot rebuild {', '.join(empty)} of {path or type(module).__name__}")


def check_materialised(module: nn.Module) -> None:
    """Make sure that no tensor without storage is left.

    Raises:
        CheckpointError: one is.
    """
    left = [
        name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.device.type == "meta"
    ]
    if left:
        raise CheckpointError(f"no weights for {', '.join(left[:5])}; the checkpoint is incomplete or of another model")


def _assign(module: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    is_parameter = leaf in dict(owner.named_parameters(recurse=False))
    setattr(owner, leaf, nn.Parameter(value, requires_grad=value.is_floating_point()) if is_parameter else value)
