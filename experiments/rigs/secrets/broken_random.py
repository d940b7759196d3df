"""Builds of the protocol whose random source always says the same: the controls of the log of nonces."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from isthmus.protocol.secure import handshake
from isthmus.protocol.secure.framing import KEY_BYTES, SEALED_SECRET_BYTES
from isthmus.protocol.session import CloudSession, EdgeSession


def _constant(count: int) -> bytes:
    return bytes(count)


class _OneMlkem:
    @staticmethod
    def generate() -> MLKEM768PrivateKey:
        return MLKEM768PrivateKey.from_seed_bytes(bytes(64))


class _OneX25519:
    @staticmethod
    def generate() -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(bytes(range(32)))


class _OneSealing:
    """A key encapsulation without a random part: what it makes of a secret is always the same, and is no secret."""

    @staticmethod
    def encrypt(secret: bytes, _key: Any, _info: bytes) -> bytes:
        return bytes(SEALED_SECRET_BYTES - len(secret)) + bytes(secret)

    @staticmethod
    def decrypt(sealed: bytes, _key: Any, _info: bytes) -> bytes:
        return sealed[-KEY_BYTES:]


@contextlib.contextmanager
def own_source() -> Iterator[None]:
    """The source of the project's own random bytes is constant: nonces of the handshake, its secret, session ids."""
    with contextlib.ExitStack() as stack:
        for side in (EdgeSession, CloudSession):
            defaults: dict[str, Any] = vars(side)["__init__"].__kwdefaults__
            stack.callback(defaults.update, random=defaults["random"])
            defaults["random"] = _constant
        yield


@contextlib.contextmanager
def every_source() -> Iterator[None]:
    """The library's source is constant too: the fresh keys of a handshake, and the encapsulation."""
    broken = {"MLKEM768PrivateKey": _OneMlkem, "X25519PrivateKey": _OneX25519, "_HPKE": _OneSealing}
    before = {name: getattr(handshake, name) for name in broken}
    with own_source():
        try:
            vars(handshake).update(broken)
            yield
        finally:
            vars(handshake).update(before)


SOURCES: Final[dict[str, Callable[[], contextlib.AbstractContextManager[None]]]] = {
    "good": contextlib.nullcontext,
    "own_constant": own_source,
    "all_constant": every_source,
}
"""How random bytes come about, by name."""
