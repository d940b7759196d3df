"""How an edge's process is set up before it holds texts, adapters and keys."""

from __future__ import annotations

import resource

import torch

from isthmus.common.errors import ConfigError


def device_of(name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        ConfigError: this machine has no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda needs a GPU that torch finds, and it finds none: check the driver and that torch is built "
            "with CUDA, or leave the option out"
        )
    return torch.device(name)


def no_core_files() -> None:
    """Write no core files from now on: one would hold texts, adapters and keys."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
