"""Noise that only the holder of a key can draw again.

Every number is a function of the key and of a label that says what it is for. So a run is repeated, or resumed, with
the same noise, and the only state to keep is what labels are made of. The stream is ChaCha20's under a key of its own
for each label (HMAC-SHA256 of the label): whoever learns some of the noise, as a cloud does that knows a text, learns
nothing of the rest. A generator with a short state, as torch's, could be solved for.

Not defended: what the rounding of fp32 tells of a number's last bits (Mironov 2012, "On Significance of the Least
Significant Bits for Differential Privacy").
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

KEY_BYTES = 32

Label = str | int | bytes
"""Part of what noise is for."""


class SecretNoise:
    """Draws by a key of 32 bytes.

    Attributes:
        fingerprint: SHA-256 (hex) of the key, to tell it from others.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"the key has {len(key)} bytes, not {KEY_BYTES}")
        self.fingerprint = hashlib.sha256(b"isthmus defence key" + key).hexdigest()
        self._key = key

    def uniform(self, count: int, *labels: Label) -> Tensor:
        """Numbers between 0 and 1, neither included, `[count]` fp64."""
        plain = [label.hex() if isinstance(label, bytes) else label for label in labels]
        key = hmac.digest(self._key, json.dumps(plain).encode(), "sha256")
        stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(8 * count))
        bits = np.frombuffer(stream, dtype="<u8") >> np.uint64(12)  # with a half, as many as fp64 has
        return torch.from_numpy((bits.astype(np.float64) + 0.5) * 2.0**-52)

    def normal(self, shape: tuple[int, ...], *labels: Label) -> Tensor:
        """Standard normal numbers, fp32, by Box and Muller's transform in fp64."""
        count = math.prod(shape)
        half = -(-count // 2)
        first, second = self.uniform(2 * half, *labels).view(2, half)
        radius, angle = (-2 * first.log()).sqrt(), 2 * math.pi * second
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count].view(shape).float()

    def order(self, count: int, *labels: Label) -> list[int]:
        """The numbers below `count` in a random order."""
        order: list[int] = self.uniform(count, *labels).argsort(stable=True).tolist()
        return order
