"""A decoder that is wrong on purpose, which shows that the fuzzer finds what it is there for.

It is the reader of messages, but for a list of sites it takes the count as it comes: without the check against
`MAX_SITES`, and with a table that is made for so many before a byte of them is there. To get there, an input needs the
right operation, a header of the right length, and a count that is over the limit.
"""

from __future__ import annotations

from collections.abc import Iterator

from fuzz.target import Cursor, Target

from isthmus.common.errors import RemoteProtocolError
from isthmus.protocol.fields import U8, U16, U32, Reader
from isthmus.protocol.limits import Limits
from isthmus.protocol.site_messages import MAX_SITES, Sites

_MAGIC = b"ISTH"


def _run(data: bytes) -> None:
    script = Cursor(data)
    if script.take(4) != _MAGIC:
        return
    reader = Reader(script.rest(), b"", Limits())
    try:
        if reader.number(U8) != Sites.op:
            return
        reader.number(U32)
        count = reader.number(U16)
    except RemoteProtocolError:
        return
    places = [0] * MAX_SITES
    for site in range(count):
        places[site] = site


def _seeds() -> Iterator[bytes]:
    yield b"\0" * 8  # nothing of the format: the fuzzer has to find the way by itself


TARGET = Target(_run, _seeds, [_run], floor=0.0, max_len=64)
