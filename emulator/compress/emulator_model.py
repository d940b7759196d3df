"""The emulator: some of the middle's layers, made smaller, as a function from hidden states to hidden states.

It takes the place of the remote span: `load_edge_parts(source, plan, emulator)` is the edge's model, so layer numbers,
PEFT names and saved adapters are those of the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from rich.console import Console
from torch import Tensor, nn

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.decoding.local_cache import LocalCache
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.sites.edge_sites import Site
from isthmus.backbone.split.span import distinct_layers, load_layers, run_layers
from isthmus.common.errors import ConfigError
from isthmus.common.progress import bar
from isthmus.emulator.compress.bridges import RIDGE, Bridge, add_bridges, bridge_places, fit_bridges
from isthmus.emulator.compress.layer_choice import Measures, select_layers
from isthmus.emulator.compress.layer_measures import measure
from isthmus.emulator.compress.public_text import fingerprint
from isthmus.emulator.compress.recipe import Recipe
from isthmus.emulator.compress.svd import replace_linears
from isthmus.emulator.compress.weight_bits import quantized_names, round_weight, stored_forms

Form = tuple[tuple[int, ...], torch.dtype | None]
"""Shape and dtype of a stored tensor; None for any floating point dtype."""


class Emulator(nn.Module):
    """A lossy middle: a `SpanFn` that keeps caches, too.

    Always in eval mode; frozen unless `trainable(True)`; gradients flow to the input.

    Made by `build_emulator` and `load_emulator`.

    Attributes:
        base: transformers' base model with these layers and nothing else.
        layers: Indices in the whole model, in running order; one that stands several times is one module.
        bridges: Where linear maps stand in for dropped layers, as in `bridges.bridge_places`.
        measures: What the layers were chosen by; None for a loaded emulator, and where no text was given.
        fitted_to: Fingerprint of the text that the bridges were fitted to; None for a loaded emulator and without any.
    """

    def __init__(
        self,
        base: nn.Module,
        layers: tuple[int, ...],
        recipe: Recipe,
        config: Any,
        *,
        bridges: tuple[int, ...] = (),
        measures: Measures | None = None,
        fitted_to: str | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.layers = layers
        self.recipe = recipe
        self.bridges = bridges
        self.config = config
        self.measures = measures
        self.fitted_to = fitted_to
        self.trainable(False)
        self.train(False)

    @property
    def layer_span(self) -> tuple[int, ...]:
        """The same as `layers`."""
        return self.layers

    @property
    def dtype(self) -> torch.dtype:
        """Floating point dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device

    @property
    def attn_implementation(self) -> str:
        """Attention implementation of the layers; the other parts of the model must use the same."""
        config: Any = self.base.config
        return str(config._attn_implementation)

    @property
    def n_params(self) -> int:
        """Number of weights held; those of a shared layer count once, those of a low-rank layer as its factors'."""
        return sum(parameter.numel() for parameter in self.parameters())

    def train(self, _mode: bool = True) -> Self:
        """Stay in eval mode: dropout never acts."""
        return super().train(False)

    def trainable(self, yes: bool = True) -> Self:
        """Let all weights be trained, or none."""
        return self.requires_grad_(yes)

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Run the layers.

        Args:
            hidden: Hidden states before the middle, `[B, S, h]`, in the emulator's dtype.
            attention_mask: `[B, S]`, 1 for tokens and 0 for padding; None for no padding.
            position_ids: `[B, S]` or `[1, S]`, or None for what the whole model does without.

        Returns:
            Hidden states in the place of those after the middle, `[B, S, h]`.
        """
        return run_layers(self.base, hidden, attention_mask, position_ids)

    def end_with(self, bridge: Bridge) -> None:
        """Have one more linear map act on the output, with and without a cache. It is none of `tensors`."""
        self.base.add_module("end", bridge.requires_grad_(False))
        self.base.register_forward_hook(_through_end)

    def new_cache(self) -> LocalCache:
        """An empty cache of keys and values, one entry for each place in the running order."""
        return LocalCache(self)

    def placed(self, sites: Sequence[Site]) -> Sequence[Site]:
        """The same sites: adapters in the middle act on no emulator, and whoever has some is refused."""
        return sites

    def tensors(self) -> dict[str, Tensor]:
        """The weights, each once, as `layers.<index in the whole model>.<name in the layer>`; not copies."""
        return {
            f"layers.{index}.{name}": tensor
            for index, layer in distinct_layers(self.base, self.layers).items()
            for name, tensor in layer.state_dict(keep_vars=True).items()
        }

    def weights(self) -> dict[str, nn.Parameter]:
        """Those of `tensors` that can be trained, by the same names; not copies."""
        return {name: tensor for name, tensor in self.tensors().items() if isinstance(tensor, nn.Parameter)}

    @torch.no_grad()
    def quantize(self) -> None:
        """Give the weights the values that a reader of the file will have. Without bits in the recipe, a no-op.

        At fp32 this is exact, and doing it again changes nothing. What is scored is then what is sent.
        """
        if self.recipe.bits is None:
            return
        for name, weight in self.tensors().items():
            if name in self.quantized_names():
                weight.copy_(round_weight(weight, self.recipe.bits))

    def quantized_names(self) -> frozenset[str]:
        """Names, as in `tensors`, of the weights that a recipe with bits rounds."""
        return frozenset(
            f"layers.{index}.{name}"
            for index, layer in distinct_layers(self.base, self.layers).items()
            for name in quantized_names(layer)
        )

    def stored_forms(self) -> dict[str, Form]:
        """What each tensor in the emulator's file is, by name."""
        forms: dict[str, Form] = {}
        bits, rounded = self.recipe.bits, self.quantized_names()
        for name, tensor in self.tensors().items():
            if bits is not None and name in rounded:
                forms |= stored_forms(name, tensor.shape, bits)
            else:
                forms[name] = (tuple(tensor.shape), None)
        return forms


def build_emulator(
    checkpoint: Checkpoint,
    plan: SplitPlan,
    recipe: Recipe,
    blocks: Tensor | None,
    *,
    device: torch.device | str = "cpu",
    progress: Console | None = None,
    measures: Measures | None = None,
    ridge: float = RIDGE,
) -> Emulator:
    """Make an emulator of a model's middle, in fp32. Nothing is trained.

    Args:
        blocks: Public text, `[n, length]` tokens, for the recipes that need it; else None.
        measures: What `measure` found for this recipe, if it has been asked already.
        ridge: Of the fit of bridges, see `RidgeSums.solve`.

    Raises:
        CheckpointError: The checkpoint is damaged or incomplete.
        ConfigError: The recipe needs text and there is none.
        DataError: There is too little text to fit bridges to.
        NonFiniteError: The model gives NaN or infinite hidden states.
        PlanError: The plan is for another number of layers, or the recipe leaves no layer.
        UnsupportedFamilyError: The architecture cannot be cut.
    """
    config = checkpoint.config
    plan.check_layers(config.num_hidden_layers)
    n_middle = len(plan.cloud)
    recipe.layers_kept(n_middle)  # before the text is measured
    if recipe.bridged and blocks is None:
        raise ConfigError("+bridged fits linear maps to public text; give some with --text")
    if measures is None and recipe.chooses_by_text and blocks is not None:
        measures = measure(checkpoint, plan, recipe, blocks, device=device, progress=progress)
    layers = tuple(plan.bottom + layer for layer in select_layers(recipe, n_middle, measures))
    base = load_layers(checkpoint, layers).to(device)
    if recipe.low_rank is not None:
        distinct = distinct_layers(base, layers)
        with bar(progress, "factorising layers", len(distinct)) as advance:
            for layer in distinct.values():
                replace_linears(layer, recipe.low_rank)
                advance()
    bridges = bridge_places(layers, plan, closed=recipe.closed) if recipe.bridged else ()
    fitted_to = None
    if bridges and blocks is not None:
        add_bridges(base, layers, bridges)
        fit_bridges(checkpoint, plan, base, layers, bridges, blocks, ridge=ridge, device=device, progress=progress)
        fitted_to = fingerprint(blocks)
    return Emulator(base, layers, recipe, config, bridges=bridges, measures=measures, fitted_to=fitted_to)


def _through_end(base: Any, _inputs: Any, output: Any) -> Any:
    output.last_hidden_state = base.end(output.last_hidden_state)
    return output
