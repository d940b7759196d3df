"""Named points in a worker's handling of a call at which a fault can be made to fall, for tests and benchmarks.

A point does nothing unless the environment names a folder in `ISTHMUS_FAULT_POINTS` and the folder has a file of the
point's name. The file says what to do, and is taken away before it is done: each fault
falls once, whoever of several workers reaches it first, and a worker that is restarted does not die of it again.

| instruction | what happens |
|---|---|
| `kill` | SIGKILL to the worker's own process |
| `raise` | an exception that no handler knows, as of a defect |
| `wait 1.5` | the thread that reached the point stands still for so many seconds |
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal, get_args

from isthmus.common.errors import ConfigError
from isthmus.common.files import write_atomic

ENVIRONMENT: Final = "ISTHMUS_FAULT_POINTS"

TrainingPoint = Literal["received", "opened", "queued", "forward_done", "backward_done", "reply_sent"]
"""A frame has arrived; a message of it is whole and open; its work waits for the compute thread; the span has run; its
reply has been handed to the network, or is none. All but the two in the middle are reached by the event loop."""

DecodingPoint = Literal["cache_ready", "step_done"]
"""A decode call's cache is cropped to where the call begins; the span has run for a step of it."""

Point = TrainingPoint | DecodingPoint

POINTS: Final[tuple[TrainingPoint, ...]] = get_args(TrainingPoint)
DECODING_POINTS: Final[tuple[DecodingPoint, ...]] = get_args(DecodingPoint)

WRAPPED: Final[dict[str, dict[str, tuple[Point | None, Point | None]]]] = {
    "isthmus.protocol.session": {"CloudSession.receive": ("received", None)},
    "isthmus.cloud.gateway.calls": {
        "SessionCalls.answer": ("opened", "reply_sent"),
        "SessionCalls._submit": (None, "queued"),
    },
    "isthmus.cloud.decoding.decode_calls": {
        "DecodeCall.trim_cache": (None, "cache_ready"),
        "DecodeCall.take": ("step_done", None),
    },
    "isthmus.cloud.session.handler": {
        "TenantSession._forward_reply": ("forward_done", None),
        "TenantSession._backward_reply": ("backward_done", None),
    },
}
"""By module, methods of a worker, and the points that are reached when each is called and when it returns."""


class InjectedFaultError(Exception):
    """What a point raises. It is no `IsthmusError`: no handler may treat it as an error that it knows."""


def environment(folder: Path) -> dict[str, str]:
    """The variables with which a cloud is started whose workers look for faults in a folder."""
    own, given = str(Path(__file__).parent), os.environ.get("PYTHONPATH")
    return {ENVIRONMENT: str(folder.absolute()), "PYTHONPATH": os.pathsep.join([own, given] if given else [own])}


def install() -> None:
    """Wrap the methods at the points: now where their modules have been imported, and else as soon as they are."""
    for name in WRAPPED:
        if name in sys.modules:
            wrap(sys.modules[name])
    sys.meta_path.insert(0, _WrappingFinder())


def wrap(module: ModuleType) -> None:
    """Wrap the methods of a module that have points. Raises AttributeError where one of them is not there."""
    for name, points in WRAPPED[module.__name__].items():
        owner, method = name.split(".")
        wrapped = getattr(module, owner)
        setattr(wrapped, method, _with_points(getattr(wrapped, method), *points))


class _WrappingFinder:
    """Finds what the others find, and has the methods wrapped when the module has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in WRAPPED:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_wrap(module: ModuleType) -> None:
                execute(module)
                wrap(module)

            spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]
        return spec


@contextlib.contextmanager
def _points(before: Point | None, after: Point | None) -> Iterator[None]:
    if before is not None:
        reached(before)
    yield
    if after is not None:
        reached(after)


def _with_points(method: Callable[..., Any], before: Point | None, after: Point | None) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **named: Any) -> Any:
        with _points(before, after):
            return method(*args, **named)

    @functools.wraps(method)
    async def call_on_the_loop(*args: Any, **named: Any) -> Any:
        with _points(before, after):
            return await method(*args, **named)

    return call_on_the_loop if inspect.iscoroutinefunction(method) else call


def arm(folder: Path, point: Point, instruction: str) -> None:
    """Let a fault fall when a worker next reaches a point of a cloud that was started with `environment(folder)`.

    Raises ConfigError where there is no such point: nobody would ever reach it.
    """
    points = (*POINTS, *DECODING_POINTS)
    if point not in points:
        raise ConfigError(f"there is no fault point {point!r}: choose one of {', '.join(points)}")
    write_atomic(folder / point, instruction.encode())


def is_armed(folder: Path, point: Point) -> bool:
    """Whether a fault still waits at a point."""
    return (folder / point).exists()


def reached(point: Point) -> None:
    """Say that the worker is at a point; does what the instruction there says, if there is one.

    Raises InjectedFaultError where the instruction is `raise`.
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
    match instruction.split():
        case ["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["wait", seconds]:
            time.sleep(float(seconds))
        case _:
            raise InjectedFaultError(f"{instruction!r} was asked for at {point}")
