"""Which tensors a Triton kernel computes, and where; all others go through torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_torch_only: ContextVar[bool] = ContextVar("torch_only", default=False)


def runs_triton(x: Tensor) -> bool:
    """Whether `x` lies on a GPU, has a dtype that the kernels know, and Triton is installed (the extra `kernels`)."""
    return x.is_cuda and x.dtype in DTYPES and not _torch_only.get() and _installed()


@contextmanager
def torch_only() -> Iterator[None]:
    """Within it everything goes through torch, which is what a kernel is compared with."""
    token = _torch_only.set(True)
    try:
        yield
    finally:
        _torch_only.reset(token)


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Within it kernels start on the GPU where `x` lies; nothing for a tensor on the CPU."""
    context: AbstractContextManager[None] = torch.cuda.device_of(x)  # type: ignore[no-untyped-call]  # torch
    return context


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
