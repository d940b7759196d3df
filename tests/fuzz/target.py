"""Targets: the decoders that are fuzzed, each behind one function of bytes.

A target swallows the errors that its decoder documents, and raises anything else; where it can, it also checks what was
accepted. A module of `fuzz.targets` has one, by the name `TARGET`.

Nothing of `isthmus` is imported here, because the fuzzer instruments it while it is imported.
"""

from __future__ import annotations

import atexit
import importlib
import pkgutil
import shutil
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"


@dataclass(frozen=True, slots=True)
class Target:
    """One decoder.

    Attributes:
        run: Decodes; raises where the decoder is wrong.
        seeds: Makes inputs with the project's own writers, from which the fuzzer starts.
        decoders: The decoder's modules, classes and functions, whose lines are counted.
        floor: Least share of these lines that the corpus must reach. It stands between what an input that is rejected
            at once reaches and what the corpus does.
        max_len: Longest input, in bytes.
        words: Byte strings that the format is made of.
    """

    run: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]
    decoders: Sequence[Any]
    floor: float
    max_len: int = 4096
    words: Sequence[bytes] = ()


def names() -> list[str]:
    """The names of all targets."""
    return sorted(module.name for module in pkgutil.iter_modules([str(HERE / "targets")]))


def load(name: str) -> Target:
    """The target of a name of `names()`, or `planted`, which is wrong on purpose."""
    module = importlib.import_module("fuzz.planted" if name == "planted" else f"fuzz.targets.{name}")
    target: Target = module.TARGET
    return target


def kept(name: str) -> list[Path]:
    """The kept inputs of a target."""
    return sorted(path for path in (CORPUS / name).glob("*") if path.is_file())


def scratch() -> Path:
    """A temporary folder of this process for a decoder that reads files."""
    folder = tempfile.mkdtemp(prefix="isthmus-fuzz-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


class Cursor:
    """Takes values from an input, zeros behind its end: a script for a target that does several things."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        """The next bytes, fewer at the end."""
        taken = self._data[self._at : self._at + count]
        self._at += len(taken)
        return taken

    def number(self, form: str = "B") -> int:
        """The next number in one of `struct`'s forms, little-endian."""
        size = struct.calcsize(f"<{form}")
        (value,) = struct.unpack(f"<{form}", self.take(size).ljust(size, b"\0"))
        return int(value)

    def block(self) -> bytes:
        """The next bytes, their number before them as 16 bits."""
        return self.take(self.number("H"))

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data))

    def __bool__(self) -> bool:
        return self._at < len(self._data)


def block(data: bytes) -> bytes:
    """What `Cursor.block` reads."""
    return struct.pack("<H", len(data)) + data


def patched(data: bytes, patches: bytes) -> bytes:
    """Bytes with some of them replaced: each patch is a place (16 bits, from the end where it is negative), a value."""
    changed = bytearray(data)
    for at in range(0, len(patches) - 2, 3):
        place, value = struct.unpack_from("<hB", patches, at)
        if -len(changed) <= place < len(changed):
            changed[place] = value
    return bytes(changed)


# Coverage of lines, without the fuzzer's instrumentation --------------------------------------------------------------

Line = tuple[str, int]


def _codes(thing: Any) -> Iterable[CodeType]:
    if isinstance(thing, ModuleType):
        own = [value for value in vars(thing).values() if getattr(value, "__module__", None) == thing.__name__]
        tables = [value for value in vars(thing).values() if isinstance(value, dict)]
        own += [value for table in tables for value in table.values() if isinstance(value, FunctionType)]
        for value in own:
            yield from _codes(value)
    elif isinstance(thing, type):
        file = getattr(sys.modules[thing.__module__], "__file__", None)
        for value in vars(thing).values():  # what `dataclass` adds stands in another file
            yield from (code for code in _codes(value) if code.co_filename == file)
    elif isinstance(thing, FunctionType | classmethod | staticmethod | property) or hasattr(thing, "__func__"):
        function = getattr(thing, "fget", None) or getattr(thing, "__func__", thing)
        yield from _nested(getattr(function, "__code__", None))


def _nested(code: CodeType | None) -> Iterable[CodeType]:
    if code is not None:
        yield code
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _nested(constant)


def lines_of(decoders: Sequence[Any]) -> set[Line]:
    """The lines of code in functions of these modules, classes and functions."""
    found: set[Line] = set()
    for code in {code for thing in decoders for code in _codes(thing)}:
        lines = {line for _, _, line in code.co_lines() if line is not None}
        found |= {(code.co_filename, line) for line in (lines - {code.co_firstlineno} or lines)}
    return found


def lines_reached(run: Callable[[bytes], None], inputs: Iterable[bytes], wanted: set[Line]) -> set[Line]:
    """Which of these lines run for the inputs. Raises what `run` raises."""
    files = {file for file, _ in wanted}
    reached: set[Line] = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            reached.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    run(b"")  # what a target sets up once is no decoding
    before = sys.gettrace()
    sys.settrace(trace)
    threading.settrace(trace)
    try:
        for data in inputs:
            run(data)
    finally:
        sys.settrace(before)
        threading.settrace(None)  # type: ignore[arg-type]  # as it was: nobody else sets one
    return reached & wanted


def everything(name: str, target: Target, *folders: Path) -> list[bytes]:
    """A target's seeds and kept inputs, and the files of further folders."""
    found = (path for folder in folders for path in sorted(folder.glob("*")) if path.is_file())
    return [*target.seeds(), *(path.read_bytes() for path in (*kept(name), *found))]
