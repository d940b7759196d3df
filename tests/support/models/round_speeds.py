"""Speeds in round numbers."""

from __future__ import annotations

from typing import Any

from isthmus.planner.speed_profile import SpeedProfile
from isthmus.protocol.tensor_codecs import ACTIVATION_CODECS


def speed(**changes: Any) -> SpeedProfile:
    """A machine on which only layers, head and adapters take time. A draft's layers take half of a step."""
    values: dict[str, Any] = {
        "batch": 2,
        "length": 10,
        "rank": 2,
        "dtype": "fp32",
        "threads": 1,
        "layer_inference": 4e3,
        "layer_forward": 2e3,
        "layer_backward": 1e3,
        "head": 5e2,
        "adapter_forward": 1e2,
        "adapter_backward": 5e1,
        "rung_s": 0.0,
        "optimizer_s": 0.0,
        "codec_s": dict.fromkeys(ACTIVATION_CODECS, 0.0),
        "message_s": 0.0,
        "byte_s": 0.0,
        "activation_bytes": 100.0,
        "process_bytes": 1_000_000,
        "memory_bytes": 0,
        "decode_layer_s": 0.001,
        "decode_head_s": 0.002,
        "verify_layer_s": 0.003,
        "verify_head_s": 0.004,
        "draft_layer_s": 0.0005,
        "draft_head_s": 0.001,
        "draft_inference": 8e6,
    }
    return SpeedProfile(**values | changes)
