"""Named points in a worker's handling of a call at which a fault can be made to fall, for tests and benchmarks.

A point does nothing unless the environment of whoever started the cloud names a folder in `ISTHMUS_FAULT_POINTS` and
the folder has a file of the point's name. The file says what to do, and is taken away before it is done: each fault
falls once, whoever of several workers reaches it first, and a worker that is restarted does not die of it again.

| instruction | what happens |
|---|---|
| `kill` | SIGKILL to the worker's own process |
| `raise` | an exception that no handler knows, as of a defect |
| `wait 1.5` | the thread that reached the point stands still for so many seconds |
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Final, Literal, get_args

from isthmus.common.errors import ConfigError
from isthmus.common.files import write_atomic

ENVIRONMENT: Final = "ISTHMUS_FAULT_POINTS"

Point = Literal["received", "opened", "queued", "forward_done", "backward_done", "reply_sent"]
"""A frame has arrived; a message of it is whole and open; its work waits for the compute thread; the span has run; its
reply is with the network. All but the two in the middle are reached by the event loop."""

POINTS: Final[tuple[Point, ...]] = get_args(Point)


class InjectedFaultError(Exception):
    """What a point raises. No `IsthmusError`: nobody is to treat it as something that he knows."""


def arm(folder: Path, point: Point, instruction: str) -> None:
    """Let a fault fall when a worker next reaches a point.

    Args:
        folder: what `ISTHMUS_FAULT_POINTS` named when the cloud was started.
        point: where.
        instruction: see the module.

    Raises:
        ConfigError: there is no such point or instruction.
    """
    if point not in POINTS:
        raise ConfigError(f"there is no fault point {point!r}: choose one of {', '.join(POINTS)}")
    _parse(instruction)
    write_atomic(folder / point, instruction.encode())


def is_armed(folder: Path, point: Point) -> bool:
    """Whether a fault still waits at a point."""
    return (folder / point).exists()


def reached(point: Point) -> None:
    """Say that the worker is at a point; does what the instruction there says, if there is one.

    Raises:
        InjectedFaultError: the instruction is `raise`.
        ConfigError: it makes no sense.
    """
    folder = os.environ.get(ENVIRONMENT)
    if not folder:
        return
    file = Path(folder) / point
    try:
        instruction = file.read_text()
        file.unlink()
    except FileNotFoundError:
        return  # nothing is armed here, or somebody else was first
    act, seconds = _parse(instruction)
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "raise":
        raise InjectedFaultError(f"a fault was asked for at {point}")
    time.sleep(seconds)


def _parse(instruction: str) -> tuple[str, float]:
    match instruction.split():
        case [("kill" | "raise") as act]:
            return act, 0.0
        case ["wait", seconds] if seconds.replace(".", "", 1).isdecimal():
            return "wait", float(seconds)
    raise ConfigError(f"{instruction!r} is no instruction for a fault point: write kill, raise, or wait and seconds")
