"""Whether what sits on a linear of the cloud adds a function of its input alone.

Over a linear with the weight `W`, a wrapper computes `f_W(x)`. The edge has `W = 0` and the cloud adds `W x`, which is
right exactly if `f_W(x) - W x = f_0(x)` for every `W`. So a copy of the wrapper is tried over a random one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from isthmus.backbone.checkpoints.weight_quantization import features_of
from isthmus.backbone.sites.edge_sites import adapters_of, is_peft_layer
from isthmus.backbone.skeleton import ALLOWED, SkeletonLayer, SkeletonLinear
from isthmus.common.errors import UnsupportedCallError

_ROWS = 3  # of the input that is tried


def check_sites(layers: Iterable[SkeletonLayer]) -> None:
    """Try one wrapper of each kind, with each of its adapters.

    Wrappers of one class and with the same shapes are of one kind.

    Args:
        layers: What stands for the cloud's layers in the edge's model.

    Raises:
        UnsupportedCallError: One looks at the weight.
    """
    tried: set[Any] = set()
    for layer in layers:
        for part, module in layer.named_modules():
            if not is_peft_layer(module):
                continue
            wrapper: Any = module
            shapes = [(name, tuple(value.shape)) for name, value in wrapper.named_parameters()]
            kind = (type(wrapper), tuple(wrapper.base_layer.weight.shape), *shapes)
            if kind in tried:
                continue
            tried.add(kind)
            for adapter in sorted(adapters_of(wrapper)):
                if not adds_to_its_linear(wrapper, adapter):
                    raise UnsupportedCallError(
                        f"adapter {adapter!r} on {layer.name}.{part}, which the cloud holds, depends on that "
                        f"linear's weight: use a method that works on the input alone ({ALLOWED}), or keep it to the "
                        "edge's own layers (layers_to_transform)"
                    )


def adds_to_its_linear(wrapper: nn.Module, adapter: str) -> bool:
    """Whether `f_W(x) - W x` equals `f_0(x)` for a random `W`, `x` and random parameters of the wrapper.

    torch's random state is left as it was.

    Args:
        wrapper: A layer of PEFT over a skeleton; it is left as it is.
        adapter: The adapter to try.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        tried: Any = copy.deepcopy(wrapper)
        tried._apply(_off_meta).to(device="cpu", dtype=torch.float64).eval()
        tried.enable_adapters(True)
        tried.set_adapter(adapter)
        for parameter in tried.parameters():
            parameter.normal_()
        real = _real_linear(tried.base_layer)
        x = torch.randn(_ROWS, features_of(real)[0], dtype=torch.float64)
        tried.base_layer = real
        with_weight: Tensor = tried(x) - real(x)
        real.weight.zero_()
        alone: Tensor = tried(x)
        return torch.allclose(with_weight, alone, rtol=1e-6, atol=1e-6 * float(alone.abs().max()) + 1e-9)


def _off_meta(tensor: Tensor) -> Tensor:
    """Random numbers for a tensor without memory: `low_cpu_mem_usage` loads an adapter's weights after this check."""
    return torch.randn(tensor.shape) if tensor.is_meta else tensor


def _real_linear(skeleton: Any) -> Any:
    """A linear of the same shape with a random weight, and a bias of zeros if it is of a class that has one."""
    linear: Any
    if isinstance(skeleton, SkeletonLinear):
        linear = nn.Linear(skeleton.in_features, skeleton.out_features, bias=False)
    else:
        linear = Conv1D(skeleton.nf, skeleton.nx)
    # With `low_cpu_mem_usage` PEFT has each new parameter made on the meta device, these as well.
    linear = linear.to_empty(device="cpu").to(torch.float64)
    for parameter in linear.parameters():
        parameter.zero_()
    linear.weight.normal_()
    return linear
