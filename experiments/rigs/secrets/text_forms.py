"""Looks for secret bytes and numbers in text: in the forms that logs, pages and files of a program would have them in.

| what is there | forms that are looked for |
|---|---|
| bytes | as they are |
| | hex, in lower and in upper case |
| | base64, standard and URL-safe, wherever the bytes begin in a group of three |
| | Python's `repr`, and JSON of latin-1 text (`\\u00ff`); both also inside of a JSON string or a metric's label |
| | values in decimal, of each byte by itself: `[12, 255, …]` |
| numbers | in decimal, as JSON, Python, numpy and torch write them, with four digits or more |

A piece is found: `PIECE` bytes, `BYTE_VALUES` values of bytes, or the numbers of a run, in the order in which they are
in memory. Between numbers there may be white space, commas, semicolons, bars and brackets.

Not looked for: a shorter piece; hex with anything between the bytes; a piece with a line break in it; fewer digits;
numbers with names or places between them; other encodings, such as base32, UTF-16, or UTF-8 of latin-1 text; anything
compressed, encrypted or hashed.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from isthmus.experiments.rigs.secrets.memory_scan import BLOCK, Scanner

PIECE = 12
"""Bytes of a canary that are looked for in text: short, as a line may end behind it, and so long that none is met by
chance."""
BYTE_VALUES = 8
"""Values of bytes in decimal: with fewer, ordinary lists of small numbers would be found."""
RUN = 3
"""Values of a canary of numbers: torch and numpy print the first and the last three of a long row."""
_CLOSE = 8  # places to look for a run whose values have digits enough
_OVERLAP = 1 << 12  # bytes of rows that two blocks share: a run in it is whole in one of them, and may count twice
Numbers = tuple[float, ...]
_DIGITS = rb"\d{0,40}+(?:\.\d{0,40}+)?(?:[eE][-+]?\d{1,3}+)?"
_BETWEEN = rb"(?:[\s,;|()\[\]]|\\n){1,32}"
_NUMBER = re.compile(rb"[-+]?\d" + _DIGITS)
# What is before the first number is looked at behind its first byte: so most places are dismissed three times as fast.
_ROW = re.compile(rb"[-+\d](?<![\w.].)%b(?:%b%b){%d,}+" % (_DIGITS, _BETWEEN, _NUMBER.pattern, RUN - 1))


class TextScanner(Scanner):
    """Counts canaries in text, in all forms that the module's docstring names.

    Args:
        canaries: What each is of, by its bytes: at least `PIECE` of them.
        runs: What canaries of numbers are of, by values that are next to each other.

    Attributes:
        scanned: Bytes that were looked through.
    """

    def __init__(self, canaries: Mapping[bytes, str], runs: Mapping[Numbers, str] = MappingProxyType({})) -> None:
        forms: dict[bytes, str] = {}
        for canary, kind in canaries.items():
            piece = canary[:PIECE]
            forms |= {form: kind for form in forms_of(piece) if form != piece}  # which the canary itself begins with
        super().__init__({**forms, **canaries})
        values = {tuple(map(float, canary[:BYTE_VALUES])): kind for canary, kind in canaries.items()}
        self._runs: dict[int, dict[Numbers, str]] = {}  # by how many values they have
        for run, kind in {**values, **runs}.items():
            self._runs.setdefault(len(run), {})[run] = kind

    def count(self, parts: Iterable[bytes]) -> Counter[str]:
        """How often canaries of each kind are in pieces of bytes, none of which goes on in another."""
        found: Counter[str] = Counter()
        for part in parts:
            found += super().count([part])
            for start in range(0, len(part), BLOCK):  # other threads go on between two blocks
                numbers = _numbers_in(part[start : start + BLOCK + _OVERLAP])
                for length, runs in self._runs.items():
                    found.update(_found_in(numbers, runs, length))
        return found


def forms_of(piece: bytes) -> Iterator[bytes]:
    """The text of some bytes in each form, without the characters that depend on what is before or behind them."""
    yield piece.hex().encode()
    yield piece.hex().upper().encode()
    for before in range(3):  # bytes of the group of three that it begins in
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            text = encode(bytes(before) + piece)
            yield text[(8 * before + 5) // 6 : 8 * (before + len(piece)) // 6]
    # A single quote has a backslash where the bytes around have both sorts of quotes.
    for written in {repr(piece)[2:-1], repr(b'"' + piece)[3:-1], json.dumps(piece.decode("latin-1"))[1:-1]}:
        yield written.encode()
        yield json.dumps(written)[1:-1].encode()


def runs_of(values: NDArray[np.float32], count: int) -> Iterator[Numbers]:
    """The first run of values, and up to so many from all over them, that are not found by chance.

    Their values differ, and none is written with two digits behind the point or fewer. Of runs that begin close to each
    other, one is preferred that has four digits where four behind the point are printed.
    """
    flat = values.ravel()
    for start in [0, *((2 * at + 1) * len(flat) // (2 * count) for at in range(count))]:
        near = (flat[begin : begin + RUN].astype(np.float64) for begin in range(start, start + _CLOSE))
        good = [run for run in near if len(set(run)) == RUN and np.isfinite(run).all() and (run != run.round(2)).all()]
        long = [run for run in good if (np.abs(run) >= 0.1).all()]
        yield from (tuple(run.tolist()) for run in (long or good)[:1])


def _numbers_in(block: bytes) -> NDArray[np.float64]:
    """The numbers of all rows of numbers, in their order; something that is no number is behind each row."""
    rows = [[*_NUMBER.findall(row), b"nan"] for row in _ROW.findall(block)]
    return np.array([number for row in rows for number in row], np.bytes_).astype(np.float64)


def _found_in(numbers: NDArray[np.float64], runs: Mapping[Numbers, str], length: int) -> Iterator[str]:
    """The kinds of the runs that are there, all of that length."""
    if len(numbers) < length:
        return
    wanted, kinds = np.array(list(runs)), list(runs.values())
    # Half of the last digit of four behind the point; of smaller numbers, half of their fourth digit at the most.
    near = 1.001 * np.minimum(5e-4 * np.abs(wanted), 5e-5 * np.maximum(1, np.abs(wanted)))
    begins = numbers[: len(numbers) - length + 1]
    order = np.argsort(begins)
    lowest = np.searchsorted(begins, wanted[:, 0] - near[:, 0], "left", order)
    highest = np.searchsorted(begins, wanted[:, 0] + near[:, 0], "right", order)
    for at in np.flatnonzero(highest > lowest):
        places = order[lowest[at] : highest[at], None] + np.arange(length)
        here = (np.abs(numbers[places] - wanted[at]) <= near[at]).all(axis=1)
        yield from [kinds[at]] * int(here.sum())
