"""Which tensors a Triton kernel computes, and where; all others go through torch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from subprocess import SubprocessError

import torch
from torch import Tensor

LOGGER = logging.getLogger("isthmus.kernels")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_torch_only: ContextVar[bool] = ContextVar("torch_only", default=False)


def runs_triton(x: Tensor) -> bool:
    """Whether `x` lies on a GPU where a kernel starts, and has a dtype that the kernels know."""
    return x.is_cuda and x.dtype in DTYPES and not _torch_only.get() and _starts(x.device)


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
def _starts(device: torch.device) -> bool:
    """Whether a kernel starts on a device, which is tried once. Where Triton is there and none starts, the log says so.

    At its first start Triton builds a module of its own, for which it needs a C compiler, Python's headers, the
    driver's library, and a folder for its cache (`TRITON_CACHE_DIR`, by default below `~`) that can be written.
    """
    if find_spec("triton") is None:
        return False
    x = torch.zeros(2, 128, device=device)
    try:
        from triton.errors import TritonError

        from isthmus.kernels import blockwise_triton
    except (ImportError, OSError) as error:
        return _without(device, error)
    try:
        blockwise_triton.quantize_int8(x)
    except (AssertionError, ImportError, OSError, RuntimeError, SubprocessError, TritonError) as error:
        return _without(device, error)
    return True


def _without(device: torch.device, error: Exception) -> bool:
    LOGGER.warning("Triton starts no kernel on %s, so torch computes: %s: %s", device, type(error).__name__, error)
    return False
