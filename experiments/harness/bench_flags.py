"""Flags that several measurements have, and how those are read that name several things. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from isthmus.common.errors import ConfigError

Model = Annotated[str, Option(help="A name (smollm2-135m), a local folder, a GGUF file or a hub id.")]
EdgeLayers = Annotated[str, Option(help="How many of the first and of the last layers the edge holds.")]
Threads = Annotated[int, Option(min=1, help="torch threads on either side.")]
Steps = Annotated[int, Option(min=1, help="Optimizer steps.")]
Examples = Annotated[int, Option(min=1, help="Examples per step.")]
ExampleTokens = Annotated[int, Option(min=32, help="Tokens per example at most.")]
Codec = Annotated[str, Option(help="Codec of the wire, as for `edge train`.")]
CloudDtype = Annotated[str, Option(help="What the cloud computes in: fp32 or bf16.")]
EdgeDtype = Annotated[str, Option(help="What the edge computes in: fp32 or bf16.")]
Task = Annotated[str, Option(help="What runs are scored on: e2e, openbookqa, arc_easy or sst2.")]
DataFolder = Annotated[Path | None, Option(help="Where the tasks lie; default: shared/data beside the checkout.")]
RunSteps = Annotated[int, Option(min=1, help="Optimizer steps of a run.")]
StepExamples = Annotated[int, Option(min=1, help="Examples of a step.")]
MaxLength = Annotated[int, Option(min=8, help="Tokens of an example at most.")]
OneRate = Annotated[float, Option(min=0, help="Of every run.")]
Test = Annotated[int | None, Option(min=2, help="Held-out documents; by default the task's.")]
Out = Annotated[Path, Option(help="Folder for finished runs; the same command goes on there.")]


def precision_of(text: str, flag: str) -> Literal["fp32", "bf16"]:
    """The precision that a flag names. Raises ConfigError if it is none."""
    if text == "fp32":
        return "fp32"
    if text == "bf16":
        return "bf16"
    raise ConfigError(f"--{flag} {text!r} is not known; use fp32 or bf16")


def names_of(text: str, flag: str, known: Sequence[str] = ()) -> tuple[str, ...]:
    """Names with commas between, of those that are `known` where such are given; all of these for an empty text.

    Raises ConfigError where a name is empty, comes twice, or is not known.
    """
    if known and not text:
        return tuple(known)
    names = tuple(name.strip() for name in text.split(","))
    if "" in names:
        raise ConfigError(f"--{flag} {text!r} has an empty name; write them with commas between")
    if len(set(names)) < len(names):
        raise ConfigError(f"--{flag} {text!r} names something twice")
    unknown = [name for name in names if known and name not in known]
    if unknown:
        raise ConfigError(f"--{flag} {unknown[0]!r} is not known: choose of {', '.join(known)}")
    return names


def numbers_of(text: str, flag: str) -> tuple[float, ...]:
    """Positive numbers with commas between. Raises ConfigError if they are something else."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(math.isfinite(value) and value > 0 for value in values):
        raise ConfigError(f"--{flag} {text!r} is not a list of positive numbers; write 1e-4,3e-4 for example")
    return values
