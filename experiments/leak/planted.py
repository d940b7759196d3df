"""Secrets for private texts: names, telephone numbers and keys, from a seeded generator. None is anybody's."""

from __future__ import annotations

import random
from typing import NamedTuple

_FIRST = ("Amara", "Bela", "Ciro", "Dagny", "Emeka", "Fenna", "Goran", "Hedda", "Imre", "Jolanda", "Kwame", "Liesel")
_LAST = ("Abara", "Bakos", "Castell", "Dvorak", "Eriksen", "Falk", "Grimaldi", "Hajdu", "Ibsen", "Jurado", "Kessler")
_KINDS = 3


class Planted(NamedTuple):
    """A secret, and the words that it stands in."""

    words: str
    secret: str


def planted(number: int, seed: int) -> Planted:
    """The secret of a text by the text's number; kinds take turns. Another seed gives others."""
    drawn = random.Random(f"secret/{seed}/{number}")  # noqa: S311  # a made-up secret
    match number % _KINDS:
        case 0:
            secret = f"{drawn.choice(_FIRST)} {drawn.choice(_LAST)}"
            return Planted(f"Ask for {secret}.", secret)
        case 1:
            secret = f"020 7946 {drawn.randrange(10_000):04d}"  # a range of numbers that Ofcom keeps for fiction
            return Planted(f"Call {secret}.", secret)
        case _:
            secret = f"{drawn.randrange(16**8):08x}"
            return Planted(f"Key {secret}.", secret)
