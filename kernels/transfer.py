"""Copies between a CPU's memory and a GPU's, by way of pinned memory, which the GPU reads and writes by itself."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | None) -> Tensor:
    """A tensor on a device; itself where it lies there, or none is named."""
    if device is None or x.device == device:
        return x
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)  # later work on the GPU waits for it by itself
    return x.to(device)


def to_host(x: Tensor) -> Tensor:
    """A tensor in the CPU's memory, whole when this returns; itself where it lies there."""
    if x.device.type != "cuda":
        return x.cpu()
    copied = torch.empty_like(x, device="cpu", pin_memory=True)
    copied.copy_(x, non_blocking=True)
    torch.cuda.current_stream(x.device).synchronize()
    return copied
