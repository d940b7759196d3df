"""Bottleneck adapters: a narrow residual block behind a module, which PEFT does not have.

Houlsby et al. (2019, "Parameter-Efficient Transfer Learning for NLP") put two of them into every layer; Pfeiffer et al.
(2021, "AdapterFusion") found one behind the layer enough, and that is what `attach_bottleneck` does. The block is a
submodule of the module that it stands behind, so names and the order of layers stay as they are.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from isthmus.backbone.skeleton import SkeletonLayer
from isthmus.common.errors import ConfigError

BOTTLENECK = "bottleneck"
"""The name of the block inside the module that it stands behind."""


class Bottleneck(nn.Module):
    """`h + up(gelu(down(dropout(h))))`, the identity at its start, as `up` is zero then.

    Its weights stay in fp32 whatever the model computes in, as PEFT keeps adapters.

    Args:
        hidden_size: Width `h` of what passes through.
        width: Width of the narrow part.
        dropout: Dropout in front of `down`.
    """

    def __init__(self, hidden_size: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden_size, width, dtype=torch.float32)
        self.up = nn.Linear(width, hidden_size, dtype=torch.float32)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Add the block's product to `hidden`, `[..., h]`; the result has its dtype."""
        return hidden + self.change(hidden)

    def change(self, hidden: Tensor) -> Tensor:
        """The block's product for `hidden`, `[..., h]`, in its dtype."""
        inner = self.down(self.dropout(hidden.to(self.down.weight.dtype)))
        product: Tensor = self.up(nn.functional.gelu(inner))
        return product.to(hidden.dtype)


def attach_bottleneck(module: nn.Module, bottleneck: Bottleneck) -> None:
    """Let what `module` returns, a tensor or a tuple that opens with one, pass through `bottleneck`.

    Args:
        module: A decoder layer, or anything else that returns hidden states `[..., h]`.
        bottleneck: The block; it moves to the module's device and becomes its submodule `bottleneck`.

    Raises:
        ConfigError: `module` has one already.
    """
    if hasattr(module, BOTTLENECK):
        raise ConfigError(
            f"a {type(module).__name__} has a bottleneck adapter already: load the model afresh, or go on from its "
            "adapter."
        )
    placed = next(module.parameters(), None)
    if placed is not None:
        bottleneck = bottleneck.to(placed.device)
    module.add_module(BOTTLENECK, bottleneck)
    if not isinstance(module, SkeletonLayer):  # behind a layer of the cloud the bottleneck is a site
        module.register_forward_hook(_pass_through)


def _pass_through(module: nn.Module, _args: Any, output: Any) -> Any:
    # The block is looked up in the module, so that a deep copy of the model uses the copy's.
    bottleneck = cast(Bottleneck, module.get_submodule(BOTTLENECK))
    if isinstance(output, tuple):
        return (bottleneck(output[0]), *output[1:])
    return bottleneck(output)
