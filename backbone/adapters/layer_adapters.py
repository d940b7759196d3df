"""Adapters on whole decoder layers: bottlenecks behind them (Houlsby et al. 2019), or their biases tuned (BitFit)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from isthmus.backbone.sites.bottleneck import BOTTLENECK, Bottleneck, attach_bottleneck
from isthmus.backbone.split.edge_model import SitedSpan
from isthmus.common.errors import CheckpointError, ConfigError

_WIDEST = 1 << 20


@dataclass(frozen=True, slots=True)
class LayerAdapter:
    """What a model with bottlenecks or tuned biases carries as its attribute `isthmus_adapter`.

    Attributes:
        method: `bottleneck` or `bitfit`.
        layers: The decoder layers that it is on, by their indices in the whole model.
        width: Width of the bottlenecks; None for `bitfit`.
    """

    method: str
    layers: tuple[int, ...]
    width: int | None = None

    def info(self) -> dict[str, Any]:
        """The contents of `isthmus_adapter.json`."""
        width = {} if self.width is None else {"width": self.width}
        return {"method": self.method, "layers": list(self.layers), **width}

    @classmethod
    def from_info(cls, info: Mapping[str, Any], path: Path) -> Self:
        """The adapter that `isthmus_adapter.json` describes.

        Raises:
            CheckpointError: It is damaged.
        """
        method, layers, width = info.get("method"), info.get("layers"), info.get("width")
        is_sound = (
            method in ("bottleneck", "bitfit")
            and isinstance(layers, list)
            and layers
            and all(type(index) is int and index >= 0 for index in layers)
            and len(set(layers)) == len(layers)
            and (method == "bitfit" or (type(width) is int and 1 <= width <= _WIDEST))
        )
        if not is_sound:
            raise CheckpointError(
                f"{path} is damaged (method {method!r}, layers {str(layers)[:60]}, width {width!r}): "
                "give a folder that training wrote."
            )
        return cls(str(method), tuple(layers or ()), width if method == "bottleneck" else None)

    def places(self, model: Any) -> dict[str, torch.Size]:
        """Names and shapes of its tensors, of which `model` is known to have places for all; nothing is allocated.

        Raises:
            ConfigError: The model lacks a layer.
        """
        self._check_layers(model)
        if self.method == "bitfit":
            return {name: parameter.shape for name, parameter in self.parameters(model).items()}
        path, _ = decoder_layers(model)
        with torch.device("meta"):
            block = Bottleneck(model.config.hidden_size, self.width or 1)
        return {
            f"{path}.{index}.{BOTTLENECK}.{name}": parameter.shape
            for index in self.layers
            for name, parameter in block.named_parameters()
        }

    def parameters(self, model: Any) -> dict[str, nn.Parameter]:
        """The parameters of a model that carries it, by their names in the whole model."""
        path, stack = decoder_layers(model)
        found: dict[str, nn.Parameter] = {}
        for index in self.layers:
            for name, parameter in stack[index].named_parameters():
                in_block = name.startswith(f"{BOTTLENECK}.")
                if in_block if self.method == "bottleneck" else name.endswith(".bias") and not in_block:
                    found[f"{path}.{index}.{name}"] = parameter
        return found

    def attach(self, model: Any) -> None:
        """Put it into `model`; it alone is trainable then. See `add_bottlenecks` and `unfreeze_biases`."""
        if self.method == "bottleneck":
            add_bottlenecks(model, self.layers, self.width or 1)
        else:
            unfreeze_biases(model, self.layers)

    def _check_layers(self, model: Any) -> None:
        plan = getattr(model, "split_plan", None)
        held = range(model.config.num_hidden_layers)
        if plan is not None and not (self.method == "bottleneck" and isinstance(model.remote_layers.span, SitedSpan)):
            held = plan.edge_layers
        for index in self.layers:
            if index not in held:
                raise ConfigError(
                    f"there is an adapter on layer {index}, which this model lacks; it holds layers "
                    f"{', '.join(map(str, held)) or '(none)'}. Load it into a model that has it."
                )


def add_bottlenecks(model: Any, layers: Sequence[int], width: int, *, dropout: float = 0.0) -> None:
    """Put a bottleneck adapter behind each of `layers`; they alone are trainable then (Houlsby et al. 2019).

    Raises:
        ConfigError: A layer has one already, or the model has no list of decoder layers.
    """
    _, stack = decoder_layers(model)
    model.requires_grad_(False)
    for index in layers:
        attach_bottleneck(stack[index], Bottleneck(model.config.hidden_size, width, dropout))
    model.isthmus_adapter = LayerAdapter("bottleneck", tuple(layers), width)


def unfreeze_biases(model: Any, layers: Sequence[int]) -> None:
    """Make the biases inside `layers` trainable, and nothing else (BitFit, Ben Zaken et al. 2022).

    Raises:
        ConfigError: The layers have no biases, or the model has no list of decoder layers.
    """
    adapter = LayerAdapter("bitfit", tuple(layers))
    biases = adapter.parameters(model)
    if not biases:
        raise ConfigError(
            f"method = 'bitfit' tunes biases, and the layers of this {model.config.model_type} model have none: "
            "use method lora or bottleneck."
        )
    model.requires_grad_(False)
    for bias in biases.values():
        bias.requires_grad_(True)
    model.isthmus_adapter = adapter


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its path in the model, such as `model.layers`.

    Raises:
        ConfigError: There is no list of so many layers.
    """
    n_layers = model.config.num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return path, module
    raise ConfigError(f"there is no list of {n_layers} decoder layers in {type(model).__name__}: use method lora.")
