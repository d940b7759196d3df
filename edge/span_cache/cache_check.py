"""What a span cache needs of a model: the same outputs of the span in every epoch, and no gradient through it."""

from __future__ import annotations

import hashlib
import json
import warnings
from typing import Any, NoReturn

import torch
from torch import nn

from isthmus.backbone.split.edge_model import EdgeModelMixin
from isthmus.common.errors import ConfigError, UnsupportedCallError


def check_cacheable(model: Any) -> bool:
    """Find out whether the span's outputs are the same in every epoch, and need no gradient.

    Returns:
        Whether `enable_input_require_grads` is on, which is warned about: the cache ignores it.

    Raises:
        ConfigError: The model is not split.
        UnsupportedCallError: Something at or below the cut is trainable, is an adapter's (which PEFT can switch off and
            on), or is random in training mode.
    """
    edge = edge_model(model)
    refuse_trainable(model)
    _refuse_dropout(edge)
    if not wants_input_grads(edge):
        return False
    warn_of_input_grads()
    return True


def warn_of_input_grads() -> None:
    """Tell the user that `enable_input_require_grads` has no place here."""
    warnings.warn(
        "enable_input_require_grads() asks for the gradient of the model's input, which the span cache does not "
        "compute: gradients end above the span, and nothing is lost, as nothing below it is trainable. "
        "disable_input_require_grads() saves the rest of the work.",
        stacklevel=3,
    )


def edge_model(model: Any) -> Any:
    """The edge's model inside what PEFT made of it.

    Raises:
        ConfigError: The model is not split.
    """
    inner = _inside(model)
    if not isinstance(inner, EdgeModelMixin):
        raise ConfigError(
            f"a {type(inner).__name__} has no span to cache: give the model that link.load_model() returns."
        )
    return inner


def cacheable_edge(model: Any) -> Any | None:
    """The edge's model; None if something at or below the cut is trained or random, or the model is not split."""
    edge = _inside(model)
    if not isinstance(edge, EdgeModelMixin) or tuned_below(model) is not None or dropout_below(edge) is not None:
        return None
    return edge


def _inside(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _parts_below(edge: Any) -> dict[str, nn.Module]:
    """What a row passes until it leaves the span, by name: embeddings, bottom layers, and the cloud's places."""
    family, plan = edge.isthmus_origin.family, edge.split_plan
    base = edge.get_submodule(family.base)
    above = {family.layers, family.norm, *family.projections[1:]}  # the first projection is the way in
    parts = {f"{family.base}.{name}": part for name, part in base.named_children() if name not in above}
    layers = getattr(base, family.layers)
    return parts | {f"{family.layers_path}.{index}": layers[index] for index in range(plan.cloud.stop)}


def _parameters_below(edge: Any) -> dict[str, nn.Parameter]:
    return {
        f"{path}.{name}": parameter
        for path, part in _parts_below(edge).items()
        for name, parameter in part.named_parameters()
    }


def refuse_trainable(model: Any) -> None:
    """Make sure that what lies at and below the cut is frozen, and the backbone's own.

    Raises:
        UnsupportedCallError: It is not.
    """
    what = tuned_below(model)
    if what is not None:
        _refuse(what, edge_model(model))


def tuned_below(model: Any) -> str | None:
    """What is trainable or an adapter's at or below the cut, as a clause; None where nothing is."""
    edge = edge_model(model)
    below = _parameters_below(edge)
    frozen_only = {id(parameter) for parameter in below.values()}
    own = {id(parameter) for parameter in edge.parameters()}
    for name, parameter in model.named_parameters():
        # What the edge's model does not have is a prompt's, which goes in at the bottom.
        if parameter.requires_grad and (id(parameter) in frozen_only or id(parameter) not in own):
            return f"{name} is trainable"
    origin = edge.isthmus_origin
    for name in below:
        if name.replace(".base_layer.", ".") not in origin.names | origin.tied.keys():
            return f"{name} is an adapter's"
    return None


def _refuse(what: str, edge: Any) -> NoReturn:
    plan = edge.split_plan
    top = ", ".join(map(str, range(plan.cloud.stop, plan.n_layers)))
    raise UnsupportedCallError(
        f"{what}, and the span cache needs everything below the edge's top layers frozen and as it was served: put "
        f"adapters on layers {top or '(none in this plan; choose one with top layers)'} only (layers_to_transform), or "
        "train without the cache"
    )


def dropout_below(edge: Any) -> tuple[str, float] | None:
    """The first module at or below the cut that drops values at random in training mode, and its rate; None for none.

    Args:
        edge: The edge's model, without PEFT's wrapper.
    """
    for path, part in _parts_below(edge).items():
        for name, module in part.named_modules():
            rate = _dropout(module)
            if rate > 0:
                return f"{path}.{name}".rstrip("."), rate
    return None


def _refuse_dropout(edge: Any) -> None:
    found = dropout_below(edge)
    if found is not None:
        raise UnsupportedCallError(
            f"{found[0]} drops values at random (p = {found[1]}) below the cut, so the span's input is another one in "
            "every epoch: set its dropout to 0, or train without the cache"
        )


def _dropout(module: nn.Module) -> float:
    """The rate at which a module itself drops values: torch's module, or an attribute for `functional.dropout`."""
    if isinstance(module, nn.Dropout):
        return float(module.p)
    return max((rate for name, rate in vars(module).items() if "drop" in name and isinstance(rate, float)), default=0.0)


def wants_input_grads(edge: Any) -> bool:
    """Whether transformers' `enable_input_require_grads`, which PEFT and Trainer call too, has hooked the embedding."""
    return bool(getattr(edge, "_require_grads_hooks", None))


def fingerprint(edge: Any, span: nn.Module | None = None) -> bytes:
    """A BLAKE2b-256 of the weights that a row passes on the edge before it reaches the span, and of a local span's."""
    hashed = hashlib.blake2b(digest_size=32)
    own = {} if span is None else {f"span.{name}": parameter for name, parameter in span.named_parameters()}
    for name, parameter in {**_parameters_below(edge), **own}.items():
        hashed.update(json.dumps([name, str(parameter.dtype), *parameter.shape]).encode())
        hashed.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.digest()
