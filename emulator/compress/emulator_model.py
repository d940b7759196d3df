"""The emulator: some of the middle's layers, made smaller, as a function from hidden states to hidden states.

It stands where the remote span stands: `load_edge_parts(source, plan, emulator)` is the edge's model, so layer numbers,
PEFT names and saved adapters are those of the whole model. Its files:

    emulator.json          {"format", "recipe", "keep", "layers"}: how it was made, and its layers in running order;
                           also "bridges", the places of its linear maps, if the recipe has them
    emulator.safetensors   each layer's tensors once, as `layers.<index in the whole model>.<name in the layer>`;
                           a linear map as `….bridge.weight` and `….bridge.bias` of the layer before it, or
                           `….entry.…` of the first layer; a factor of a low-rank layer as `….down` and `….up`; a
                           quantized weight as `….int8` or `….int4` and `….scale`

Shapes follow from these two and the model's configuration, and a file that has others is refused before it is read.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from isthmus.backbone.checkpoints.assembly import check_materialised
from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.checkpoints.tensor_reader import read_json
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.span import distinct_layers, empty_layers, load_layers, run_layers
from isthmus.common.errors import CheckpointError, ConfigError, IsthmusError, NonFiniteError, PlanError
from isthmus.common.files import disk_errors, write_atomic
from isthmus.common.progress import bar
from isthmus.emulator.compress.bridges import add_bridges, bridge_places, fit_bridges
from isthmus.emulator.compress.layer_choice import Measures, select_layers
from isthmus.emulator.compress.layer_measures import measure
from isthmus.emulator.compress.public_text import fingerprint
from isthmus.emulator.compress.recipe import EMULATOR_FILE, EMULATOR_INFO, Recipe
from isthmus.emulator.compress.svd import replace_linears
from isthmus.emulator.compress.weight_bits import from_stored, quantized_names, round_weight, stored_forms, to_stored

_FORMAT = 1
_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_FLOATING = frozenset({torch.float32, torch.bfloat16, torch.float16})


class Emulator(nn.Module):
    """A lossy middle, a `SpanFn`. Always in eval mode; frozen unless `trainable(True)`; gradients flow to the input.

    Made by `build_emulator` and `load_emulator`.

    Attributes:
        base: transformers' base model with these layers and nothing else.
        layers: Indices in the whole model, in running order; one that stands several times is one module.
        recipe: How it was made.
        bridges: Where linear maps stand in for dropped layers, as in `bridges.bridge_places`.
        config: Configuration of the whole model.
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

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensors in the emulator's file."""
        forms = _forms(self, self.recipe.bits).values()
        return sum(torch.Size(shape).numel() * (dtype or self.dtype).itemsize for shape, dtype in forms)

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

    def tensors(self) -> dict[str, Tensor]:
        """The weights, each once, as `layers.<index in the whole model>.<name in the layer>`; not copies."""
        return {
            f"layers.{index}.{name}": tensor
            for index, layer in distinct_layers(self.base, self.layers).items()
            for name, tensor in layer.state_dict(keep_vars=True).items()
        }

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


def build_emulator(
    checkpoint: Checkpoint,
    plan: SplitPlan,
    recipe: Recipe,
    blocks: Tensor | None,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    device: torch.device | str = "cpu",
    progress: Console | None = None,
    measures: Measures | None = None,
) -> Emulator:
    """Make an emulator of a model's middle. Nothing is trained.

    Args:
        checkpoint: The whole model.
        plan: Where the middle is.
        recipe: Which layers are kept, and what is done to them.
        blocks: Public text, `[n, length]` tokens, for the recipes that need it; else None.
        dtype: Floating point dtype of the weights.
        attn_implementation: Attention implementation; None for the family's default.
        device: Where to measure, and where the emulator lies.
        progress: Where progress is shown; None for standard error.
        measures: What `measure` found for this recipe, if it has been asked already.

    Raises:
        CheckpointError: The checkpoint is damaged or incomplete.
        ConfigError: The recipe needs text and there is none, or the attention implementation does not fit.
        DataError: There is too little text to fit bridges to.
        NonFiniteError: The model gives NaN or infinite hidden states.
        PlanError: The plan is for another number of layers, or the recipe leaves no layer.
        UnsupportedFamilyError: The architecture cannot be cut.
    """
    config = checkpoint.config
    if plan.n_layers != config.num_hidden_layers:
        raise PlanError(
            f"split plan {plan} is for {plan.n_layers} layers, but the model has {config.num_hidden_layers}; "
            "parse it again"
        )
    n_middle = len(plan.cloud)
    recipe.layers_kept(n_middle)  # before the text is measured
    if recipe.bridged and blocks is None:
        raise ConfigError("+bridged fits linear maps to public text; give some with --text")
    where: dict[str, Any] = {"attn_implementation": attn_implementation, "device": device}
    if measures is None and recipe.chooses_by_text and blocks is not None:
        measures = measure(checkpoint, plan, recipe, blocks, **where, progress=progress)
    layers = tuple(plan.bottom + layer for layer in select_layers(recipe, n_middle, measures))
    base = load_layers(checkpoint, layers, dtype=dtype, attn_implementation=attn_implementation).to(device)
    if recipe.low_rank is not None:
        distinct = distinct_layers(base, layers)
        with bar(progress, "factorising layers", len(distinct)) as advance:
            for layer in distinct.values():
                replace_linears(layer, recipe.low_rank)
                advance()
    bridges = bridge_places(layers, plan) if recipe.bridged else ()
    fitted_to = None
    if bridges and blocks is not None:
        add_bridges(base, layers, bridges)
        fit_bridges(checkpoint, plan, base, layers, bridges, blocks, **where, progress=progress)
        fitted_to = fingerprint(blocks)
    return Emulator(base, layers, recipe, config, bridges=bridges, measures=measures, fitted_to=fitted_to)


def save_emulator(emulator: Emulator, folder: Path) -> None:
    """Write `emulator.safetensors` and `emulator.json` into `folder`, each whole or not at all.

    Weights that the recipe quantizes are written quantized; the emulator itself stays as it is (see
    `Emulator.quantize`).

    Raises:
        DiskError: The disk is full or cannot be written.
        NonFiniteError: A weight is NaN or infinite.
    """
    bits, rounded = emulator.recipe.bits, emulator.quantized_names()
    stored: dict[str, Tensor] = {}
    for name, tensor in emulator.tensors().items():
        weight = tensor.detach().cpu()
        if not weight.isfinite().all():
            raise NonFiniteError(f"the emulator's {name} is not finite; build it again, or distil it more gently")
        stored |= to_stored(name, weight, bits) if bits and name in rounded else {name: weight.contiguous()}
    info = {
        "format": _FORMAT,
        "recipe": str(emulator.recipe),
        "keep": emulator.recipe.keep,
        "layers": list(emulator.layers),
    }
    if emulator.recipe.bridged:
        info["bridges"] = list(emulator.bridges)
    path = folder / EMULATOR_FILE
    temporary = folder / f".{EMULATOR_FILE}.new"
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file(stored, temporary, metadata={"format": "pt"})
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    write_atomic(folder / EMULATOR_INFO, (json.dumps(info, indent=2, sort_keys=True) + "\n").encode())


def load_emulator(
    folder: Path,
    config: Any,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    device: torch.device | str = "cpu",
) -> Emulator:
    """Read an emulator that `save_emulator` wrote. The files may come from anywhere: what does not fit is refused.

    Names, shapes and dtypes are compared with what the recipe and the configuration ask for before any tensor is read.

    Args:
        folder: Where the two files are.
        config: Configuration of the whole model.
        dtype: Floating point dtype of the weights in memory; quantized weights are exact at fp32.
        attn_implementation: Attention implementation; None for the family's default.
        device: Where the weights lie.

    Raises:
        CheckpointError: A file is missing, damaged, of another model, or holds a number that is not finite.
        ConfigError: The attention implementation does not fit the family.
        UnsupportedFamilyError: The architecture cannot be cut.
    """
    recipe, layers, bridges = _read_info(folder / EMULATOR_INFO, config)
    base = empty_layers(config, layers, dtype=dtype, attn_implementation=attn_implementation)
    distinct = distinct_layers(base, layers)
    if recipe.low_rank is not None:
        for layer in distinct.values():
            replace_linears(layer, recipe.low_rank)
    add_bridges(base, layers, bridges)
    emulator = Emulator(base, layers, recipe, config, bridges=bridges)
    values = _read_tensors(folder / EMULATOR_FILE, emulator, dtype)
    for index, layer in distinct.items():
        prefix = f"layers.{index}."
        own = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        layer.load_state_dict(own, strict=True, assign=True)
    check_materialised(base)
    return emulator.trainable(False).to(device)


def _read_info(path: Path, config: Any) -> tuple[Recipe, tuple[int, ...], tuple[int, ...]]:
    info = read_json(path)
    bridges = info.pop("bridges", None)
    if info.get("format") != _FORMAT or info.keys() != {"format", "recipe", "keep", "layers"}:
        raise CheckpointError(f"{path} is not an emulator of format {_FORMAT}; get it again from the model's owner")
    keep, layers = info["keep"], info["layers"]
    if not isinstance(info["recipe"], str) or isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise CheckpointError(f"{path}: recipe and keep are a text and a number; get it again from the model's owner")
    try:
        recipe = Recipe.parse(info["recipe"], float(keep))
    except (IsthmusError, OverflowError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    n_layers = config.num_hidden_layers
    if (
        not isinstance(layers, list)
        or not 0 < len(layers) <= n_layers
        or not all(type(layer) is int and 0 <= layer < n_layers for layer in layers)
        or layers != sorted(layers)
    ):
        raise CheckpointError(
            f"{path}: its list of layers does not fit the model's {n_layers}; get it again from the model's owner"
        )
    if not _bridges_fit(bridges, layers, recipe):
        raise CheckpointError(
            f"{path}: its bridges do not fit its layers and its recipe; get it again from the model's owner"
        )
    return recipe, tuple(layers), tuple(bridges or ())


def _bridges_fit(bridges: Any, layers: list[int], recipe: Recipe) -> bool:
    """Whether `bridges`, of a file, is what `bridge_places` gives for some split plan with these layers."""
    if not recipe.bridged:
        return bridges is None
    if not isinstance(bridges, list) or not all(type(place) is int for place in bridges):
        return False
    first, last = layers[0], layers[-1]
    inner = [layer for layer, following in pairwise(layers) if following > layer + 1]
    before = [place for place in bridges if place < first]  # the middle begins after it, and not at the first layer
    after = [place for place in bridges if place >= last]
    return (
        len(set(layers)) == len(layers)
        and bridges == [*before, *inner, *after]
        and len(before) <= 1
        and all(-1 <= place < first - 1 for place in before)
        and after in ([], [last])
    )


def _forms(emulator: Emulator, bits: int | None) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shape and dtype of each tensor in the file; None for any floating point dtype."""
    forms: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
    rounded = emulator.quantized_names()
    for name, tensor in emulator.tensors().items():
        if bits is not None and name in rounded:
            forms |= stored_forms(name, tensor.shape, bits)
        else:
            forms[name] = (tuple(tensor.shape), None)
    return forms


def _read_tensors(path: Path, emulator: Emulator, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights by their names in the emulator, in `dtype`."""
    bits = emulator.recipe.bits
    forms = _forms(emulator, bits)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            _check_forms(path, file, forms)
            stored = {name: file.get_tensor(name) for name in forms}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); get it again from the model's owner") from error
    for name, tensor in stored.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"tensor {name} in {path} is not finite; get it again from the model's owner")
    values = {}
    for name, weight in emulator.tensors().items():
        if name in stored:
            values[name] = stored[name].to(dtype, copy=True)
        else:
            assert bits is not None  # noqa: S101  # only a quantized weight is not in the file by its own name
            values[name] = from_stored(name, stored, weight.shape[-1], bits).to(dtype)
    return values


def _check_forms(path: Path, file: Any, forms: Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]) -> None:
    names = set(file.keys())
    if names != forms.keys():
        name = min(names ^ forms.keys())
        raise CheckpointError(
            f"{path} {'has a strange' if name in names else 'lacks the'} tensor {name}; "
            "get it again from the model's owner"
        )
    for name, (shape, wanted) in forms.items():
        view = file.get_slice(name)
        found, dtype = tuple(view.get_shape()), _DTYPES.get(view.get_dtype())
        if found != shape or (dtype not in _FLOATING if wanted is None else dtype != wanted):
            raise CheckpointError(
                f"tensor {name} in {path} is {view.get_dtype()} {list(found)}, but the model asks for "
                f"{list(shape)} of {'a floating point dtype' if wanted is None else wanted}; "
                "it belongs to another model"
            )
