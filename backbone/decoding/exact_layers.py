"""Layers that give a token the same bits alone and among others: what `ExactCall` does for a span, for the edge's own.

Products of few rows get rows of zeros beside them, so that there are as many as make a product independent of their
number. Attention takes a prompt as one block, and what follows token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from isthmus.backbone.checkpoints.weight_quantization import features_of
from isthmus.backbone.decoding.decode_pass import parts_of
from isthmus.backbone.runtime.batch_invariance import measure_linears
from isthmus.backbone.runtime.sequence_packing import Plain, wrap_attention
from isthmus.backbone.sites.low_rank import LowRankSite
from isthmus.common.errors import UnsupportedCallError


@contextmanager
def exact_layers(model: nn.Module) -> Iterator[None]:
    """Let the layers of a model be exact inside.

    Raises:
        UnsupportedCallError: On this machine the products of its linears depend on the number of rows, however many; or
            the model has an adapter that multiplies by itself, not in linears.
    """
    for name, module in model.named_modules():
        if not _multiplies_in_linears(module):
            raise UnsupportedCallError(
                f"{name} has an adapter of {_kind(module)}, which multiplies outside of linears, so its bits depend on "
                "the number of tokens: decode fast, or use plain LoRA on linears of the edge's layers"
            )
    every = [each for each in model.modules() if isinstance(each, (nn.Linear, Conv1D))]
    linears = [each for each in every if next(each.parameters(), None) is not None]  # skeletons have none
    if not linears:
        raise UnsupportedCallError("a model without linears has nothing to be exact")
    weight, threads = next(linears[0].parameters()), torch.get_num_threads()
    rows = _rows_for(tuple(linears), threads, weight)
    if rows is None:
        raise UnsupportedCallError(
            "this machine's products have other bits for every number of rows: decode fast, or in fp32"
        )
    owners: list[Any] = [each for each in model.modules() if hasattr(each, "config")]
    configs = {id(each.config): each.config for each in owners}.values()
    with ExitStack() as stack:
        for linear in linears:
            stack.enter_context(_padded(linear, rows))
        for config in configs:
            stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = _token_by_token(config._attn_implementation)
        yield


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _multiplies_in_linears(module: nn.Module) -> bool:
    """Whether all products of an adapter's module are those of linears in it, as of plain LoRA and of scalings."""
    from peft.tuners import ia3, lora  # which takes seconds to import
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(module, (BaseTunerLayer, LowRankSite)):
        return True
    if type(module) is lora.layer.Linear:  # LoRA of embeddings and of bare parameters multiplies by itself
        return not module.lora_variant  # DoRA and its like
    return type(module) is ia3.layer.Linear


_measured: dict[tuple[object, ...], int | None] = {}
"""What was measured in this process: of an output layer it takes seconds."""


def _rows_for(linears: Sequence[nn.Linear | Conv1D], threads: int, weight: nn.Parameter) -> int | None:
    """From how many rows on the linears' products have the same bits; None where no number is enough."""
    shapes = frozenset((type(each), *features_of(each)) for each in linears)
    key = (shapes, threads, weight.device, weight.dtype)
    if key not in _measured:
        found = measure_linears(linears, threads, threads, weight.device, weight.dtype, backward=False)
        _measured[key] = found.rows
    return _measured[key]


@contextmanager
def _padded(linear: nn.Module, rows: int) -> Iterator[None]:
    """Give a linear at least so many rows."""
    shapes: list[torch.Size] = []

    def pad(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        shapes.append(x.shape)
        flat = x.reshape(-1, x.shape[-1])
        return (torch.cat([flat, flat.new_zeros(max(0, rows - len(flat)), flat.shape[1])]), *args[1:])

    def cut(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        shape = shapes.pop()
        return output[: shape[:-1].numel()].view(*shape[:-1], -1)

    handles = linear.register_forward_pre_hook(pad), linear.register_forward_hook(cut)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _token_by_token(inner: str) -> str:
    """The name of the attention implementation that takes what follows a prompt token by token."""

    def attend(
        plain: Plain, module: nn.Module, states: tuple[Tensor, ...], mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        query, key, value = states
        length, n_keys = query.shape[2], key.shape[2]
        blocks = (length,) if length == n_keys else (1,) * length
        outputs = []
        for each in parts_of(blocks, n_keys, options.get("sliding_window"), mask, key.device):
            seen = key[:, :, each.seen], value[:, :, each.seen]
            outputs.append(plain(module, query[:, :, each.rows], *seen, each.mask, **options)[0])
        return torch.cat(outputs, dim=1)

    name = wrap_attention(inner, "exact", attend)
    if inner in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    return name
