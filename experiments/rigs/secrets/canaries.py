"""What an edge of this process sends and gets, and its session keys: the bytes that are then looked for in the cloud.

All of it is what the cloud really has: activations and gradients as they cross and as fp32, leased weights, the
traffic secrets of sessions and the AES keys made of them. In text, tensors are also looked for as numbers.
"""

from __future__ import annotations

import contextlib
from typing import Any, Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from isthmus.experiments.rigs.secrets.memory_scan import WINDOW, canaries_of
from isthmus.experiments.rigs.secrets.text_forms import Numbers, runs_of
from isthmus.protocol import messages as m
from isthmus.protocol.secure.framing import KEY_BYTES, KeyChain
from isthmus.protocol.session import EdgeSession, Received
from isthmus.protocol.tensor_codecs import Payload, Role, codec_by_id, decode

WINDOWS: Final = 6
"""Canaries of each tensor, and of each form of it."""
SECRET, KEY, LEASED = "traffic secret", "AES key", "leased weights"
ACTIVATIONS, GRADIENTS = "activations", "gradients"
TENSORS: Final = (ACTIVATIONS, GRADIENTS)


class Captured:
    """Canaries of whatever crosses inside the context, by kind. A context manager.

    Attributes:
        canaries: What each is of, by its bytes.
        runs: The same for numbers of tensors, by values that are next to each other.
    """

    def __init__(self) -> None:
        self.canaries: dict[bytes, str] = {}
        self.runs: dict[Numbers, str] = {}
        self._stack = contextlib.ExitStack()

    @property
    def kinds(self) -> list[str]:
        """Kinds of canaries that there are."""
        return sorted(set(self.canaries.values()))

    def __enter__(self) -> Captured:
        self._wrap(KeyChain, "_install", self._installed)
        self._wrap(EdgeSession, "send", lambda _session, message: self._message(message))
        received = EdgeSession.receive

        def receive(session: EdgeSession, frame: Any) -> Any:
            event = received(session, frame)
            if isinstance(event, Received):
                self._message(event.message)
            return event

        self._replace(EdgeSession, "receive", receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _wrap(self, owner: type, name: str, before: Any) -> None:
        method = getattr(owner, name)

        def call(*arguments: Any) -> Any:
            before(*arguments)
            return method(*arguments)

        self._replace(owner, name, call)

    def _replace(self, owner: type, name: str, method: Any) -> None:
        self._stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, method)

    def _installed(self, chain: KeyChain) -> None:
        """A key of a session: its first bytes, which are unlike any others."""
        secret = bytes(chain._secret)
        key = HKDFExpand(SHA256(), KEY_BYTES, b"isthmus traffic key").derive(secret)
        self.canaries |= {secret[:WINDOW]: SECRET, key[:WINDOW]: KEY}

    def _message(self, message: m.Message) -> None:
        if isinstance(message, m.Lease):
            for leased in message.weights:
                self._tensor(leased.down, LEASED)
                self._tensor(leased.up, LEASED)
        elif isinstance(message, m.Forward | m.ForwardReply):
            self._tensor(message.hidden)
        elif isinstance(message, m.Backward | m.BackwardReply) and message.gradient is not None:
            self._tensor(message.gradient)

    def _tensor(self, payload: Payload, name: str = "") -> None:
        codec = codec_by_id(payload.codec).name
        what = ACTIVATIONS if payload.role == Role.ACTIVATION else GRADIENTS
        longest = max(payload.buffers, key=len)
        for window in canaries_of(bytes(longest), WINDOWS):
            self.canaries[window] = name or f"{codec} {what}, as they cross"
        values = decode(payload).float().numpy()
        as_fp32 = name or f"{codec} {what}, as {'they cross' if codec == 'fp32' else 'fp32'}"
        if codec != "fp32":
            self.canaries |= dict.fromkeys(canaries_of(values.tobytes(), WINDOWS), as_fp32)
        self.runs |= dict.fromkeys(runs_of(values, WINDOWS), as_fp32)
