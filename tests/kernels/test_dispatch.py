"""Whether a kernel or torch computes: a kernel is tried once, and where it does not start, torch is taken.

Triton is a stand-in here, and so is the GPU: a tensor on the CPU that says that it lies on one.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from isthmus import kernels
from isthmus.kernels import dispatch
from isthmus.kernels.blockwise import quantize_int8
from isthmus.kernels.dispatch import runs_triton


class OnGpu(Tensor):
    is_cuda = True


class TritonError(Exception):
    pass


class Kernels:
    """Stands in for `blockwise_triton`."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.starts = 0

    def quantize_int8(self, x: Tensor) -> str:
        self.starts += 1
        if self.failure is not None:
            raise self.failure
        return f"a kernel, {list(x.shape)}"


def on_gpu() -> Any:
    return torch.ones(3, 64).as_subclass(OnGpu)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    triton, errors, found = ModuleType("triton"), ModuleType("triton.errors"), Kernels()
    triton.__spec__ = ModuleSpec("triton", None)
    errors.TritonError = TritonError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setitem(sys.modules, "triton.errors", errors)
    monkeypatch.setitem(sys.modules, "isthmus.kernels.blockwise_triton", found)
    monkeypatch.setattr(kernels, "blockwise_triton", found, raising=False)
    dispatch._starts.cache_clear()
    yield found
    dispatch._starts.cache_clear()


def test_a_kernel_is_tried_once_and_then_used(stand_in: Kernels) -> None:
    assert runs_triton(on_gpu())
    assert runs_triton(on_gpu())
    assert stand_in.starts == 1
    assert quantize_int8(on_gpu()) == "a kernel, [3, 64]"  # type: ignore[comparison-overlap]


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        subprocess.CalledProcessError(1, ["gcc", "main.c"]),  # Python's headers are missing
        AssertionError("libcuda.so cannot found!"),
        PermissionError(13, "Permission denied", "/.triton"),
        TritonError("ptxas does not know this GPU"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_where_no_kernel_starts_torch_computes_and_one_line_says_so(
    stand_in: Kernels, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in.failure = failure
    with caplog.at_level(logging.WARNING, "isthmus.kernels"):
        q, scale = quantize_int8(on_gpu())
        quantize_int8(on_gpu())
    assert stand_in.starts == 1
    assert q.shape == (3, 64)
    assert scale.shape == (3, 1)
    (record,) = caplog.records
    assert "torch computes" in record.getMessage()
    assert str(failure) in record.getMessage()


def test_a_triton_that_does_not_load_is_done_without(stand_in: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton.errors", None)
    assert not runs_triton(on_gpu())
    assert stand_in.starts == 0


def test_without_triton_nothing_is_tried_or_said(
    stand_in: Kernels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not runs_triton(on_gpu())
    assert stand_in.starts == 0
    assert caplog.records == []


def test_an_error_of_memory_is_not_taken_for_a_missing_triton(
    stand_in: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_args: object, **_options: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            runs_triton(on_gpu())
    assert runs_triton(on_gpu())  # nothing was remembered
