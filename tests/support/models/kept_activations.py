"""Whether what activation functions give is kept for a backward."""

from __future__ import annotations

import gc
import weakref

from torch import UntypedStorage, nn
from transformers.activations import ACT2FN

_KINDS = tuple(type(ACT2FN[name]) for name in ("silu", "gelu", "gelu_pytorch_tanh"))

Storages = list[weakref.ref[UntypedStorage]]


def given_by_activations(module: nn.Module) -> Storages:
    """From now on, the storages of what the activation functions of a module give."""
    given: Storages = []
    for each in module.modules():
        if isinstance(each, _KINDS):
            each.register_forward_hook(lambda *args: given.append(weakref.ref(args[2].untyped_storage())))
    return given


def count_kept(given: Storages) -> int:
    """How many of them are still there."""
    gc.collect()
    return sum(each() is not None for each in given)
