"""Every kernel compiles to machine code, which needs no GPU. `test_triton.py` runs this in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from isthmus.kernels import blockwise_triton, grouped_triton

TARGET = GPUTarget("cuda", 80, 32)
GROUPED = {"scales": "*fp32", "groups": "*i32", "tiles": "*i32"}
TILES = {"block_t": grouped_triton.ROWS, "block_r": grouped_triton.MAX_RANKS, "block_k": grouped_triton.COLUMNS}
INT8 = {"q": "*i8", "scales": "*fp32", "out": "*fp32"}
INT4 = {"q": "*u8", "scales": "*bf16", "out": "*fp32"}


def _machine_code(
    kernel: Any, types: dict[str, str], constants: dict[str, int], *, fusion: bool, ones: tuple[str, ...] = ()
) -> str:
    """The PTX. Of the arguments that are `ones` Triton makes constants, too, as it does at a launch."""
    constants = constants | dict.fromkeys(ones, 1)
    signature = {
        parameter.name: "constexpr" if parameter.name in constants else types.get(parameter.name, "i32")
        for parameter in kernel.params
    }
    done = compile_kernel(ASTSource(kernel, signature, constants), TARGET, {"enable_fp_fusion": fusion})
    assert done.asm["cubin"]
    ptx: str = done.asm["ptx"]
    return ptx


@pytest.mark.parametrize(
    ("dtype", "ones"),
    [
        ("fp32", ("column_stride",)),  # A as it is packed
        ("bf16", ("column_stride",)),
        ("bf16", ("rank_stride",)),  # B
        ("bf16", ("rank_stride", "column_stride", "width", "columns")),
    ],
)
@pytest.mark.parametrize("name", ["_shrink_kernel", "_expand_kernel", "_outer_kernel"])
def test_grouped(name: str, dtype: str, ones: tuple[str, ...]) -> None:
    types = GROUPED | dict.fromkeys(("out", "x", "h", "weight"), f"*{dtype}")
    ptx = _machine_code(getattr(grouped_triton, name), types, TILES, fusion=True, ones=ones)
    assert ("mma." in ptx) == (dtype == "bf16")  # no TF32
    assert "tf32" not in ptx


SIZES = pytest.mark.parametrize("ones", [(), ("count", "n", "blocks")], ids=["any size", "one number"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@SIZES
def test_quantize(dtype: str, ones: tuple[str, ...]) -> None:
    int8, int4 = blockwise_triton._quantize_int8_kernel, blockwise_triton._quantize_int4_kernel
    tile, x = {"tile": blockwise_triton.TILE}, {"x": f"*{dtype}"}
    eight = _machine_code(int8, INT8 | x, tile, fusion=False, ones=ones)
    four = _machine_code(int4, INT4 | x, tile, fusion=False, ones=ones)
    for ptx in (eight, four):
        assert "div.rn.f32" in ptx
        assert "div.full" not in ptx
        assert "tf32" not in ptx
    assert "fma" not in eight


@SIZES
def test_dequantize(ones: tuple[str, ...]) -> None:
    int8, int4 = blockwise_triton._dequantize_int8_kernel, blockwise_triton._dequantize_int4_kernel
    tile = {"tile": blockwise_triton.TILE}
    _machine_code(int8, INT8, tile, fusion=False, ones=ones)
    assert "tf32" not in _machine_code(int4, INT4, tile, fusion=False, ones=ones)
