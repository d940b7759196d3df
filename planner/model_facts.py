"""What a plan needs to know of a model: sizes, the linears of a decoder layer, which of them carry adapters, and FLOPs.

The architecture is built on torch's meta device from its configuration: no weight is read.

FLOPs are those of one token position, forward and to the input backward, as a frozen weight has no gradient of its own.
With P weights in a layer's linears, S positions in a sequence and heads of a width of A together, a layer takes
2P + 4SA forward and 2P + 8SA backward. Norms, activations and softmaxes are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from isthmus.backbone.checkpoints.assembly import build_on_meta
from isthmus.backbone.families import family_of
from isthmus.backbone.runtime.site_host import linear_groups
from isthmus.backbone.sites.ladder_network import LadderSide
from isthmus.backbone.skeleton import named_linears
from isthmus.backbone.split.span import empty_layers
from isthmus.edge.config.training_config import TuningConfig
from isthmus.edge.run_report import count
from isthmus.edge.training.methods import build_peft


@dataclass(frozen=True, slots=True)
class Linear:
    """One frozen linear of a decoder layer.

    Attributes:
        name: Its name inside the layer, such as `self_attn.q_proj`.
        group: Number of the input that it reads; linears of one group share it.
    """

    name: str
    inputs: int
    outputs: int
    group: int
    is_site: bool

    @property
    def parameters(self) -> int:
        """Weights."""
        return self.inputs * self.outputs

    def adapter_parameters(self, rank: int) -> int:
        """Weights of a LoRA adapter on it; 2 FLOPs each forward and 4 backward, for one position."""
        return rank * (self.inputs + self.outputs)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model's sizes. All its decoder layers are alike.

    Attributes:
        hidden: Width h of the hidden states.
        vocabulary: Rows of the LM head.
        heads: Attention heads.
        attention: Heads times their width.
        layer_parameters: All weights of one decoder layer.
        outside_parameters: All weights outside the decoder layers, those that are tied counted once.
        linears: The linears of one decoder layer, in the order in which they run.
    """

    hidden: int
    n_layers: int
    vocabulary: int
    heads: int
    attention: int
    layer_parameters: int
    outside_parameters: int
    head_parameters: int
    linears: tuple[Linear, ...]

    @classmethod
    def of(cls, config: Any, rank: int = 8, targets: Sequence[str] | None = None) -> ModelFacts:
        """The facts of a transformers configuration.

        Args:
            targets: Names of the linears that carry adapters; None for PEFT's usual ones.

        Raises:
            ConfigError: the model has no such linear.
            UnsupportedFamilyError: the architecture cannot be cut.
        """
        family = family_of(config)
        model = build_on_meta(config, family, torch.float32, None)
        layers: Any = model.get_submodule(family.layers_path)
        layer_parameters = count(layers[0].parameters())
        heads, hidden = config.num_attention_heads, config.hidden_size
        head = model.get_output_embeddings().weight
        return cls(
            hidden=hidden,
            n_layers=config.num_hidden_layers,
            vocabulary=head.shape[0],
            heads=heads,
            attention=heads * (getattr(config, "head_dim", None) or hidden // heads),
            layer_parameters=layer_parameters,
            outside_parameters=count(model.parameters()) - config.num_hidden_layers * layer_parameters,
            head_parameters=head.numel(),
            linears=_linears(config, _site_names(model, rank, targets)),
        )

    @property
    def linear_parameters(self) -> int:
        """Weights of the linears of one decoder layer."""
        return sum(linear.parameters for linear in self.linears)

    def forward_flops(self, length: int) -> int:
        """FLOPs of one layer's forward, for one position of a sequence of `length`."""
        return 2 * self.linear_parameters + 4 * length * self.attention

    def backward_flops(self, length: int) -> int:
        """FLOPs of one layer's backward to its input, for one position of a sequence of `length`."""
        return 2 * self.linear_parameters + 8 * length * self.attention

    @property
    def head_flops(self) -> int:
        """FLOPs of the LM head, forward and to its input backward, for one position."""
        return 4 * self.head_parameters

    def ladder(self, taps: int, tap_width: int | None = None) -> tuple[int, int]:
        """Weights and tensors of a ladder side network with so many taps."""
        with torch.device("meta"):
            parameters = list(LadderSide(self.hidden, self.heads, range(taps), tap_width=tap_width).parameters())
        return count(parameters), len(parameters)

    @property
    def sites(self) -> tuple[Linear, ...]:
        """The linears of one decoder layer that carry adapters."""
        return tuple(linear for linear in self.linears if linear.is_site)

    @property
    def site_groups(self) -> tuple[tuple[Linear, ...], ...]:
        """The same, those that share an input together."""
        groups: dict[int, list[Linear]] = {}
        for site in self.sites:
            groups.setdefault(site.group, []).append(site)
        return tuple(map(tuple, groups.values()))


def _site_names(model: Any, rank: int, targets: Sequence[str] | None) -> frozenset[str]:
    """Names inside a layer of the linears that PEFT wraps; `model` has adapters in its first layer afterwards."""
    config = TuningConfig(data="-", rank=rank, target_modules=None if targets is None else tuple(targets))
    adapted = build_peft(model, config, layers=[0])
    layer: Any = adapted.get_base_model().get_submodule(family_of(model.config).layers_path)[0]
    return frozenset(name for name, module in layer.named_modules() if isinstance(module, BaseTunerLayer))


def _linears(config: Any, sites: frozenset[str]) -> tuple[Linear, ...]:
    """The linears of a decoder layer, group by group."""
    base = empty_layers(config, (0,), dtype=torch.float32, attn_implementation=None)
    modules = dict(named_linears(getattr(base, family_of(config).layers)[0]))
    return tuple(
        Linear(name, *_features(modules[name]), number, name in sites)
        for number, group in enumerate(linear_groups(config))
        for name in group
    )


def _features(module: nn.Module) -> tuple[int, int]:
    rows, columns = module.get_parameter("weight").shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
