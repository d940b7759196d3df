"""A decoder that is wrong on purpose, which shows that the fuzzer finds what it is there for.

It reads the number of sites of a list as it comes: without the check against `MAX_SITES`, and with a table that is made
for so many before one of them is there. To get there, an input needs the magic, the right kind of message, and a count
that is over the limit.
"""

from __future__ import annotations

from collections.abc import Iterator

from fuzz.target import Cursor, Target

from isthmus.protocol.messages import MAX_SITES

_MAGIC = b"ISTH"
_SITES = 17


def _run(data: bytes) -> None:
    script = Cursor(data)
    if script.take(4) != _MAGIC:
        return
    if script.number() != _SITES:
        return
    count = script.number("H")
    places = [0] * MAX_SITES
    for site in range(count):
        places[site] = site


def _seeds() -> Iterator[bytes]:
    yield b"\0" * 8  # nothing of the format: the fuzzer has to find the way by itself


TARGET = Target(_run, _seeds, [_run], floor=0.0, max_len=64)
