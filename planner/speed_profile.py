"""A machine's measured speed, as `isthmus.planner.speed_probe` finds it and a file carries it. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from isthmus.common.errors import ConfigError

_REMEDY = "measure again with `isthmus plan --probe --json` on that machine"
_ABOVE_ZERO = ("layer_", "head", "adapter_", "decode_", "verify_", "draft_")

VERIFY_TOKENS = 9
"""Tokens of a measured verification: a draft of eight and the token before it."""
DRAFT_DTYPE = "bf16"
"""What `isthmus edge generate` drafts in unless it is told otherwise (`--draft-dtype`)."""

ITEM_BYTES = {"fp32": 4, "bf16": 2}
"""Bytes of a weight, by dtype."""


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """What is measured: `batch` sequences of `length` positions, adapters of `rank`, weights in `dtype`."""

    batch: int = 4
    length: int = 128
    rank: int = 8
    dtype: str = "fp32"
    threads: int = 1


@dataclass(frozen=True, slots=True)
class SpeedProfile:
    """A machine's speed.

    Attributes:
        batch, length, rank, dtype, threads: What it was measured with.
        layer_inference: FLOPs per second of a decoder layer's forward without a graph.
        layer_forward: The same with a graph for a backward.
        layer_backward: FLOPs per second of its backward to the input.
        head: FLOPs per second of LM head and loss, forward and backward.
        adapter_forward: FLOPs per second of LoRA products, forward.
        adapter_backward: The same backward.
        rung_s: Seconds per rung of a ladder side network and token position, forward and backward.
        optimizer_s: Seconds per trained tensor of a step of AdamW with clipping.
        codec_s: Seconds per number, for one encoding, one decoding and the checks about them, of each codec.
        message_s: Seconds per message over loopback, sealing and opening included.
        byte_s: Seconds more per byte of it.
        activation_bytes: Bytes that a decoder layer keeps for its backward, per token position.
        process_bytes: Resident memory of a process with all that is imported, before there is any model; 0 if unknown.
        memory_bytes: Memory that is free for a process; 0 if unknown.
        decode_layer_s: Seconds of a decoder layer for the next token of one text, with `length` tokens in the cache.
        decode_head_s: Seconds of the LM head and a greedy choice, for one token.
        verify_layer_s: As `decode_layer_s`, for the next `VERIFY_TOKENS` tokens at once.
        verify_head_s: As `decode_head_s`, for `VERIFY_TOKENS` tokens.
        draft_layer_s: As `decode_layer_s`, in `DRAFT_DTYPE`.
        draft_head_s: As `decode_head_s`, in `DRAFT_DTYPE`.
        draft_inference: FLOPs per second of a decoder layer in `DRAFT_DTYPE` over a prompt of `length` tokens.
    """

    batch: int
    length: int
    rank: int
    dtype: str
    threads: int
    layer_inference: float
    layer_forward: float
    layer_backward: float
    head: float
    adapter_forward: float
    adapter_backward: float
    rung_s: float
    optimizer_s: float
    codec_s: dict[str, float]
    message_s: float
    byte_s: float
    activation_bytes: float
    process_bytes: int
    memory_bytes: int
    decode_layer_s: float
    decode_head_s: float
    verify_layer_s: float
    verify_head_s: float
    draft_layer_s: float
    draft_head_s: float
    draft_inference: float

    @classmethod
    def read(cls, path: Path) -> SpeedProfile:
        """The profile in a file that `isthmus plan --probe --json` wrote.

        Raises:
            ConfigError: there is no such file, or it holds something else.
        """
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as a measured speed ({error}); {_REMEDY}") from error
        if not isinstance(tree, dict) or set(tree) != {field.name for field in fields(cls)}:
            raise ConfigError(f"{path} is no measured speed of this version; {_REMEDY}")
        codecs = tree["codec_s"]
        numbers = [value for name, value in tree.items() if name not in {"dtype", "codec_s"}]
        numbers += codecs.values() if isinstance(codecs, dict) else [None]
        if not all(isinstance(value, int | float) and value >= 0 for value in numbers):
            raise ConfigError(f"{path} has a value that is no number, or below 0; {_REMEDY}")
        if tree["dtype"] not in ITEM_BYTES:
            raise ConfigError(f"{path} has dtype = {str(tree['dtype'])[:20]!r}; {_REMEDY}")
        zeros = [name for name in tree if name.startswith(_ABOVE_ZERO) and not tree[name]]
        if zeros:
            raise ConfigError(f"{path} has {zeros[0]} = 0; {_REMEDY}")
        return cls(**tree)

    def layer_s(self, tokens: int) -> float:
        """Seconds of a decoder layer for so many tokens of one text at once: a line through what was measured."""
        return _line(self.decode_layer_s, self.verify_layer_s, tokens)

    def head_s(self, tokens: int) -> float:
        """The same of the LM head."""
        return _line(self.decode_head_s, self.verify_head_s, tokens)


def _line(one: float, several: float, tokens: int) -> float:
    """What `tokens` take, from what one and `VERIFY_TOKENS` take. More tokens never take less."""
    return one + (tokens - 1) * max(0.0, several - one) / (VERIFY_TOKENS - 1)
