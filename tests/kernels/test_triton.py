"""The Triton kernels: in Triton's interpreter on any machine, through its compiler, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (the extra `kernels`)")


def _passes(file: str, cache: Path, **variables: str) -> None:
    """Run a file of checks in a process of its own, as Triton reads TRITON_INTERPRET once, when it is imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    plain = ("-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plain, str(FOLDER / file)],
        cwd=ROOT,
        env=kept | {"TRITON_CACHE_DIR": str(cache)} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@needs_triton
@pytest.mark.long
def test_the_kernels_in_the_interpreter(tmp_path: Path) -> None:
    _passes("triton_checks.py", tmp_path, TRITON_INTERPRET="1")


@pytest.mark.long
@needs_triton
def test_the_kernels_compile(tmp_path: Path) -> None:
    _passes("triton_compile_checks.py", tmp_path)


@needs_triton
@pytest.mark.gpu
def test_the_kernels_on_a_gpu(tmp_path: Path) -> None:
    _passes("triton_checks.py", tmp_path)


@needs_triton
def test_without_a_compiler_no_kernel_starts_and_nothing_fails(tmp_path: Path) -> None:
    program = (
        "import torch\n"
        "from triton.backends import backends\n"
        "from isthmus.kernels.dispatch import _starts\n"
        "backends['nvidia'].driver.is_active = lambda: True\n"  # as on a machine with a GPU
        "print(_starts(torch.device('cpu')))"
    )
    kept = {name: value for name, value in os.environ.items() if name not in ("CC", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=kept | {"PATH": "", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"
    assert "torch computes: RuntimeError: Failed to find C compiler" in done.stderr


def test_nothing_imports_triton_before_it_is_needed() -> None:
    program = (
        "import sys, torch\n"
        "from isthmus.kernels import blockwise, dispatch, grouped\n"
        "x = torch.randn(4, 64)\n"
        "blockwise.dequantize_int8(*blockwise.quantize_int8(x))\n"
        "blockwise.dequantize_int4(*blockwise.quantize_int4(x), 64)\n"
        "grouped.grouped_low_rank(x, [4], [torch.randn(2, 64)], [torch.randn(8, 2)], [1.0])\n"
        "print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
