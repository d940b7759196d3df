"""Linear maps in the place of dropped layers, fitted in closed form on public text.

A run of decoder layers is replaced by one linear map, `h + W h + b`, as in ReplaceMe (Shopkhoev et al. 2025,
arXiv:2505.02819). Here W and b are the weighted ridge regression of what the whole middle does with that run, on what
the emulator itself gives at that place: so a bridge also corrects what the bridges before it left over. Each position
weighs one over the mean square of its target, as in half of `measure.relative_error`.

A bridge belongs to the kept layer before the run and acts on its output; one for a run at the very beginning acts on
the input of the first kept layer. A closing bridge stands in for no layer and corrects what is left at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.span import arrange_layers, distinct_layers
from isthmus.common.errors import DataError, NonFiniteError
from isthmus.common.progress import bar
from isthmus.emulator.compress.layer_measures import Middle
from isthmus.emulator.compress.outer_layers import OuterLayers
from isthmus.emulator.compress.public_text import spread

# Tokens that a map is fitted to, for each of its inputs. At 64 the error on other text is near that on the fitted one;
# where tokens are about as many as inputs, a map does more harm on other text than no map.
TOKENS_PER_INPUT = 64
LEAST_TOKENS_PER_INPUT = 8

RIDGE = 1e-3  # of the diagonal
_TOKENS_AT_ONCE = 4096


class Bridge(nn.Linear):
    """`h -> h + W h + b`: hidden states before a run of layers to those after it, `[..., width]`."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, width, dtype=torch.float32, device=device)

    def reset_parameters(self) -> None:
        """Called by `nn.Linear`: start as what changes nothing, without a draw from the global generator."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., h]` -> `[..., h]`."""
        return hidden + super().forward(hidden)


def bridge_places(layers: Sequence[int], plan: SplitPlan, *, closed: bool = False) -> tuple[int, ...]:
    """The layers after which a run of the middle is dropped, by their indices in the whole model.

    The layer before the middle is among them if the middle's first layer is dropped. `layers` are those that are kept;
    with `closed` the last of them is among the places in any case.
    """
    kept = {*layers, plan.bottom - 1}
    places = tuple(layer - 1 for layer in plan.cloud if layer not in kept and layer - 1 in kept)
    return (*places, layers[-1]) if closed and layers[-1] not in places else places


def add_bridges(base: nn.Module, layers: Sequence[int], bridges: Sequence[int]) -> None:
    """Put bridges that change nothing yet into a base model, as `bridge` and `entry` of its layers.

    Args:
        bridges: From `bridge_places`; a layer that is none of `layers` stands for the input of the first one.
    """
    distinct = distinct_layers(base, layers)
    config: Any = base.config
    for place in bridges:
        layer = distinct.get(place, distinct[layers[0]])
        bridge = Bridge(config.hidden_size, next(layer.parameters()).device)
        if place in distinct:
            layer.add_module("bridge", bridge)
            layer.register_forward_hook(_after)
        else:
            layer.add_module("entry", bridge)
            layer.register_forward_pre_hook(_before, with_kwargs=True)


@torch.no_grad()
def fit_bridges(
    checkpoint: Checkpoint,
    plan: SplitPlan,
    base: nn.Module,
    layers: Sequence[int],
    bridges: Sequence[int],
    blocks: Tensor,
    *,
    ridge: float = RIDGE,
    device: torch.device | str = "cpu",
    progress: Console | None = None,
) -> None:
    """Fit the bridges that `add_bridges` put into `base`, one after another, in place.

    Args:
        base: The kept layers with their bridges; what else was done to the layers has been done.
        blocks: Public text, `[n, length]`; blocks at even distances are used, of `TOKENS_PER_INPUT * h` tokens. Their
            hidden states are computed anew for each bridge, some thousand tokens at a time, so that memory does not
            grow with the text.
        ridge: See `RidgeSums.solve`.

    Raises:
        DataError: There is too little text, less than `LEAST_TOKENS_PER_INPUT * h` tokens.
        NonFiniteError: The model gives NaN or infinite hidden states.
    """
    width = checkpoint.config.hidden_size
    if blocks.numel() < LEAST_TOKENS_PER_INPUT * width:
        raise DataError(
            f"the public text has {blocks.numel()} tokens, too few to fit linear maps of width {width} to: give "
            f"{LEAST_TOKENS_PER_INPUT * width} or more, better {TOKENS_PER_INPUT * width}"
        )
    used = spread(blocks, TOKENS_PER_INPUT * width)
    ends = OuterLayers(checkpoint, plan, with_top=False, device=device)
    parts = torch.split(used, max(1, _TOKENS_AT_ONCE // blocks.shape[1]))
    whole = Middle.of(checkpoint, plan, device)
    kept = Middle(base, layers, plan.bottom, checkpoint.config)
    distinct: dict[int, Any] = distinct_layers(base, layers)
    with bar(progress, "fitting bridges", len(bridges) * len(parts)) as advance:
        for place in bridges:
            # A bridge is fitted at the end of its run: before the next kept layer, or at the middle's end.
            stop = next((layer for layer in layers if layer > place), plan.cloud.stop)
            before = [layer - plan.bottom for layer in layers if layer <= place]
            sums = RidgeSums(width, device)
            for part in parts:
                entry = ends.entry(part.to(device))
                # The bridge itself still changes nothing.
                sums.add(kept.run(before, entry), whole.run(range(stop - plan.bottom), entry))
                advance()
            bridge = distinct[place].bridge if place in distinct else distinct[layers[0]].entry
            weight, bias = sums.solve(ridge)
            bridge.weight.copy_(weight)
            bridge.bias.copy_(bias)
    arrange_layers(base, [distinct[layer] for layer in layers], layers, checkpoint.config)


class RidgeSums:
    """What the weighted ridge regression of `target - x` on `x` needs of tokens, however many there are, in fp64.

    Attributes:
        gram: `[h + 1, h + 1]`, of the inputs and a one.
        moments: `[h + 1, h]`, of these and the residuals.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=device)
        self.moments = torch.zeros(width + 1, width, dtype=torch.float64, device=device)

    def add(self, x: Tensor, target: Tensor) -> None:
        """Count tokens: hidden states and what a bridge shall make of them, both `[..., h]`."""
        x, target = x.flatten(0, -2).double(), target.flatten(0, -2).double()
        weight = target.square().mean(-1, keepdim=True).clamp_min(1e-12).reciprocal()
        inputs = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        weighted = (inputs * weight).T
        self.gram += weighted @ inputs
        self.moments += weighted @ (target - x)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Weight `[h, h]` and bias `[h]` of the best bridge, in fp32.

        Args:
            ridge: Share of the sums' diagonal that is added to it.

        Raises:
            NonFiniteError: There is none, as where a hidden state was not finite.
        """
        diagonal = self.gram.diagonal()
        gram = self.gram + torch.diag(ridge * diagonal + 1e-9 * diagonal.mean())
        solution = torch.linalg.solve(gram, self.moments).float()  # [h + 1, h]
        if not solution.isfinite().all():
            raise NonFiniteError("a linear map fitted to this text is not finite; check the checkpoint")
        return solution[:-1].T.contiguous(), solution[-1]

    def bridge(self, ridge: float) -> Bridge:
        """The bridge that `solve` finds."""
        weight, bias = self.solve(ridge)
        bridge = Bridge(len(bias), weight.device)
        bridge.load_state_dict({"weight": weight, "bias": bias})
        return bridge


def _after(layer: Any, _inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return layer.bridge(output[0]), *output[1:]
    return layer.bridge(output)


def _before(layer: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if inputs:
        return (layer.entry(inputs[0]), *inputs[1:]), options
    return inputs, options | {"hidden_states": layer.entry(options["hidden_states"])}
