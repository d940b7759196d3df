"""What the bits of a computation depend on beside its inputs and its weights, in one line."""

from __future__ import annotations

from pathlib import Path

import torch

VARYING = ", bits vary with the batch"
"""The note of a worker on whose machine a call's bits depend on what else is computed with it."""
FIRST_OF_STAGES = ", first of several stages"
"""The note of a worker that has some of the cloud's layers: the bits depend on the numerics of the others, too."""
_CPU_INFO = Path("/proc/cpuinfo")
_MOST = 256
"""Characters: a session's information has no more in a text (`isthmus.protocol.session_info.MAX_INFO_TEXT`)."""


def numerics(span_dtype: str, attention: str, device: torch.device, threads: int, note: str = "") -> str:
    """Dtype, attention, torch's build, processor and threads: where all are the same, so are the bits of a call.

    Args:
        span_dtype: What is computed in, with its quantization.
        attention: The implementation of attention.
        device: Where.
        threads: torch threads.
        note: What else they depend on.
    """
    if device.type == "cuda":
        where, end = torch.cuda.get_device_name(device), note
    else:
        where, end = processor_name(), f", {threads} threads{note}"
    said = f"{span_dtype}, {attention}, torch {torch.__version__}, {where}".encode("ascii", "replace").decode()
    return said[: _MOST - len(end)] + end  # a long name is cut, and nothing behind it


def are_complete(numerics: str) -> bool:
    """Whether a call's bits depend on nothing but these, its inputs and the weights."""
    return not numerics.endswith((VARYING, FIRST_OF_STAGES))


def processor_name() -> str:
    """The processor's name, and the instructions that torch's kernels use of it."""
    try:
        names = [line.partition(":")[2].strip() for line in _CPU_INFO.read_text().splitlines() if "model name" in line]
    except OSError:  # this is not Linux
        names = []
    return f"{names[0] if names else 'unknown processor'} {torch.backends.cpu.get_cpu_capability()}"
