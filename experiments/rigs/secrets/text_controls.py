"""Controls of places with text: something in each form, made for one place alone, that must be found there.

It is written by the standard library, numpy and torch, and not by what looks for it.
"""

from __future__ import annotations

import base64
import json
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from isthmus.cloud.telemetry.logs import JsonFormatter
from isthmus.experiments.rigs.secrets.memory_scan import WINDOW
from isthmus.experiments.rigs.secrets.text_forms import RUN, Numbers

AS_IT_IS: Final = "as it is"


def _base64(encode: Callable[[bytes], bytes], before: int, content: bytes) -> str:
    return encode(os.urandom(before) + content).decode()


_OF_BYTES: Final[Mapping[str, Callable[[bytes], str]]] = {
    "hex": bytes.hex,
    "upper-case hex": lambda content: content.hex().upper(),
    "base64": partial(_base64, base64.b64encode, 0),
    "base64 after 1 byte": partial(_base64, base64.b64encode, 1),
    "base64 after 2 bytes": partial(_base64, base64.b64encode, 2),
    "URL-safe base64": partial(_base64, base64.urlsafe_b64encode, 0),
    "URL-safe base64 after 1 byte": partial(_base64, base64.urlsafe_b64encode, 1),
    "URL-safe base64 after 2 bytes": partial(_base64, base64.urlsafe_b64encode, 2),
    "Python's repr": repr,
    "JSON of latin-1 text": lambda content: json.dumps(content.decode("latin-1")),
    "values of bytes": lambda content: json.dumps(list(content)),
}
_OF_NUMBERS: Final[Mapping[str, Callable[[NDArray[np.float32]], str]]] = {
    "numbers in JSON": lambda values: json.dumps(values.tolist()),
    "numbers as numpy prints them": str,
    "numbers as torch prints them": lambda values: str(torch.from_numpy(values)),
    "numbers as torch prints them with exponents": lambda values: str(torch.tensor([*values.tolist(), 1e-6])),
}


class Planted:
    """What is written into a place, and what must be found there then.

    Args:
        place: Its name.
        as_it_is: Whether the place can hold any bytes, and not text alone.

    Attributes:
        raw: Bytes to write as they are; none where the place has text alone.
        texts: What else to write, by form.
        canaries, runs: What to look for, as `TextScanner` takes it.
    """

    def __init__(self, place: str, *, as_it_is: bool = True) -> None:
        self._place = place
        self.raw = _window() if as_it_is else b""
        self.texts: dict[str, str] = {}
        self.canaries: dict[bytes, str] = {self.raw: self._kind(AS_IT_IS)} if as_it_is else {}
        self.runs: dict[Numbers, str] = {}
        for form, written in _OF_BYTES.items():
            window = _window()
            self.texts[form] = written(window + os.urandom(8))
            self.canaries[window] = self._kind(form)
        for form, printed in _OF_NUMBERS.items():
            values = np.random.default_rng().uniform(0.1, 2, 3 * RUN).astype(np.float32)
            self.texts[form] = printed(values)
            self.runs[tuple(values[RUN : 2 * RUN].tolist())] = self._kind(form)

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of all that must be found."""
        return frozenset((*self.canaries.values(), *self.runs.values()))

    @property
    def pieces(self) -> list[bytes]:
        """All of it."""
        return [*([self.raw] if self.raw else []), *(text.encode() for text in self.texts.values())]

    @property
    def lines(self) -> bytes:
        """All of it, to write into a file."""
        return b"\n".join(self.pieces) + b"\n"

    @property
    def log_lines(self) -> bytes:
        """All of it, to write into a log: what is text as a worker logs it."""
        texts = (_logged(form, text) for form, text in self.texts.items())
        return b"\n".join((self.raw, *texts)) + b"\n"

    def found(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Of each form, how often it was found, by what a scanner has counted."""
        forms = [AS_IT_IS] if self.raw else []
        return {form: counts.get(self._kind(form), 0) for form in (*forms, *self.texts)}

    def _kind(self, form: str) -> str:
        return f"control of {self._place}, {form}"


def _window() -> bytes:
    """Random bytes whose two sorts of base64 differ, however they lie: eleven one bits are a `/` or a `_`."""
    return os.urandom(4) + b"\xff\xff" + os.urandom(WINDOW - 6)


def _logged(form: str, text: str) -> bytes:
    about = {"msg": "control", "levelname": "INFO", "fields": {"form": form, "control": text}}
    return JsonFormatter().format(logging.makeLogRecord(about)).encode()
