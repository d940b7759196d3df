"""The form of a span: what it computes in, how its weights are held, and what a saved one says of that. No torch."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from isthmus.backbone.checkpoints.tensor_reader import read_json
from isthmus.common.errors import CheckpointError, ConfigError

DTYPE_NAMES = ("fp32", "bf16")
NONE = "none"
QUANTIZER_NAMES = ("int8", "nf4")

INFO_FILE = "isthmus_span.json"
PARTS = "parts"


def check_dtype(name: str) -> None:
    """Make sure that a span can compute in what an option names.

    Raises:
        ConfigError: It cannot.
    """
    if name not in DTYPE_NAMES:
        raise ConfigError(f"unknown dtype {name!r}: choose one of {', '.join(DTYPE_NAMES)}")


def check_quantizer(name: str) -> None:
    """Make sure that a span's weights can be held as an option names it.

    Raises:
        ConfigError: There is no such way, or bitsandbytes is not installed.
    """
    if name == NONE:
        return
    if name not in QUANTIZER_NAMES:
        raise ConfigError(f"unknown quantization {name!r}: choose one of {', '.join((NONE, *QUANTIZER_NAMES))}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"--quantize {name} needs the package bitsandbytes: pip install 'isthmus[quantize]'")


@dataclass(frozen=True, slots=True)
class SpanInfo:
    """What a saved span is.

    Attributes:
        dtype: What it computes in, `fp32` or `bf16`.
        quantize: How its linears are held.
    """

    model: str
    plan: str
    dtype: str
    quantize: str


def is_saved_span(folder: Path) -> bool:
    """Whether `save_span` wrote the folder."""
    return (folder / INFO_FILE).is_file()


def read_info(folder: Path) -> SpanInfo:
    """What a folder's span is.

    Raises:
        CheckpointError: The folder's description is damaged.
    """
    values = read_json(folder / INFO_FILE)
    names = set(SpanInfo.__dataclass_fields__)
    if set(values) != names or not all(isinstance(value, str) for value in values.values()):
        raise CheckpointError(
            f"{folder / INFO_FILE} needs the texts {', '.join(sorted(names))}, and holds {json.dumps(values)[:200]}; "
            "write it anew with `isthmus cloud quantize`"
        )
    info = SpanInfo(**values)
    if info.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{folder / INFO_FILE} has the dtype {info.dtype!r}; write it anew")
    return info
