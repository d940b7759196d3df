"""The frozen vectors of `tests/vectors`: how they are written, read and changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "vectors"
WORDS = ("about", "name", "of", "error", "piece", "flight", "to", "replaced_by")
"""Keys whose values are words; every other text is bytes in hexadecimal."""


def read(name: str) -> Any:
    """A file of vectors, with bytes where it has hexadecimal."""
    return _walk(json.loads((FOLDER / name).read_text()), bytes.fromhex)


def write(name: str, vectors: Any) -> None:
    """Write a file of vectors, with hexadecimal where there are bytes."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / name).write_text(json.dumps(_walk(vectors, None), indent=1) + "\n")


def _walk(value: Any, parse: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _walk(each, parse, name) for name, each in value.items()}
    if isinstance(value, list):
        return [_walk(each, parse, key) for each in value]
    if isinstance(value, bytes | bytearray):
        return value.hex()
    return parse(value) if parse and isinstance(value, str) and key not in WORDS else value


def flipped(vectors: Any) -> Iterator[tuple[str, Any]]:
    """Every copy of vectors in which one bit of one value of bytes is another, and the value's place."""
    if isinstance(vectors, dict):
        for name, each in vectors.items():
            for place, changed in flipped(each):
                yield f"{name}.{place}", {**vectors, name: changed}
    elif isinstance(vectors, list):
        for number, each in enumerate(vectors):
            for place, changed in flipped(each):
                yield f"{number}.{place}", [*vectors[:number], changed, *vectors[number + 1 :]]
    elif isinstance(vectors, bytes) and vectors:
        # Not at the ends of a private key of X25519, of which some bits do not count, and not in the second half of a
        # seed of ML-KEM, which counts for wrong ciphertexts only.
        place = len(vectors) // 3
        yield "", vectors[:place] + bytes([vectors[place] ^ 1]) + vectors[place + 1 :]


def delivered(good: list[bytes], change: dict[str, Any]) -> bytes:
    """A frame or flight as a negative vector has it arrive.

    `frame` is its number among the good ones; then `xor` (`at`, `with`), `cut_to` so many bytes, or `append`.
    """
    frame = good[change["frame"]]
    if "xor" in change:
        at, mask = change["xor"]["at"], change["xor"]["with"]
        return frame[:at] + bytes(a ^ b for a, b in zip(frame[at:], mask, strict=False)) + frame[at + len(mask) :]
    return frame[: change.get("cut_to", len(frame))] + change.get("append", b"")
