"""Writes down with which key and nonce AES-GCM has sealed anything, and looks for a pair that came twice.

The log stands in the place of the cipher that the handshake and the records use, so nothing of the protocol decides
what is logged. A key is written as a hash of it: the log must hold no secrets.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from isthmus.protocol.secure import framing, handshake

_LABEL = b"isthmus bench secrets"
KEY_HASH, NONCE = 16, 12
PAIR = KEY_HASH + NONCE
"""Bytes of an entry: a hash of the key, and the nonce."""

Sink = Callable[[bytes], object]
"""Takes an entry."""


def _logged_cipher(sink: Sink) -> type[Any]:
    class LoggedCipher:
        """AES-GCM that says what it seals with before it does. What it opens, the other side has sealed."""

        def __init__(self, key: Any) -> None:
            self._cipher = AESGCM(key)
            self._key = sha256(_LABEL + bytes(key)).digest()[:KEY_HASH]

        def encrypt(self, nonce: bytes, *rest: Any) -> bytes:
            sink(self._key + nonce)
            return self._cipher.encrypt(nonce, *rest)

        def encrypt_into(self, nonce: bytes, *rest: Any) -> int:
            sink(self._key + nonce)
            return self._cipher.encrypt_into(nonce, *rest)

        def decrypt(self, *arguments: Any) -> bytes:
            return self._cipher.decrypt(*arguments)

        def decrypt_into(self, *arguments: Any) -> int:
            return self._cipher.decrypt_into(*arguments)

    return LoggedCipher


@contextlib.contextmanager
def logged(sink: Sink) -> Iterator[None]:
    """Give `sink` an entry for whatever this process's handshakes and records seal."""
    places, before = (framing, handshake), AESGCM
    for module in places:
        module.AESGCM = _logged_cipher(sink)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in places:
            module.AESGCM = before  # type: ignore[attr-defined]


def file_sink(path: Path) -> Sink:
    """Adds entries to a file, each with one write: what was sealed before a SIGKILL is there."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    return lambda entry: os.write(descriptor, entry)


def entries_of(paths: Iterable[Path]) -> Iterator[bytes]:
    """The entries of files."""
    for path in paths:
        log = path.read_bytes()
        yield from (log[at : at + PAIR] for at in range(0, len(log), PAIR))


@dataclass(frozen=True, slots=True)
class Sealed:
    """What was sealed.

    Attributes:
        records: AEAD operations.
        keys: Different keys.
        reuses: Operations whose key and nonce had been used before.
    """

    records: int
    keys: int
    reuses: int

    @classmethod
    def of(cls, entries: Iterable[bytes]) -> Sealed:
        """Count entries."""
        seen = Counter(entries)
        records = seen.total()
        return cls(records, len({entry[:KEY_HASH] for entry in seen}), records - len(seen))
