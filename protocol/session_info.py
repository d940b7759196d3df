"""What the cloud tells an edge about the session, in the handshake's last flight."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from isthmus.common.errors import MessageError
from isthmus.protocol.limits import KIB, Text

MAX_INFO = 16 * KIB
"""Most bytes of a session's information."""
MAX_INFO_TEXT = 256
"""Most characters of a text of it."""

PlanText = Annotated[str, Text(re.compile(r"[0-9]{1,6}:[0-9]{1,6}"), "two numbers with ':' between are needed")]


@dataclass(frozen=True, slots=True)
class SpanLimits:
    """What the cloud accepts of one tenant."""

    max_tokens_per_call: int
    max_message_bytes: int
    activation_cache_bytes: int


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """What the cloud tells an edge in the handshake's last message.

    Digest, plan and session id name files and sessions on the edge, so nothing but digits gets through.

    Attributes:
        session_id: 16 random bytes in hexadecimal.
        model: the name that the cloud serves the backbone under.
        digest: SHA-256 of the backbone's checkpoint, in hexadecimal.
        family: the architecture, as in `isthmus.backbone.families`.
        n_layers: decoder layers of the whole model.
        plan: the split plan, for example "2:2".
        hidden_size: width of the hidden states.
        attn_implementation: the attention implementation that both sides use.
        span_dtype: the dtype that the span computes in, "fp32" or "bf16", and how its weights are held where they are
            quantized, as in "bf16+nf4".
        codecs: names of the codecs that the cloud accepts and sends.
        limits: what the cloud accepts of this edge.
        server_version: the cloud's version of Isthmus.
        numerics: what the bits of an answer depend on, as the cloud says: dtype, attention, torch, processor, threads.
    """

    session_id: Annotated[str, Text(re.compile(r"[0-9a-f]{32}"), "32 hexadecimal digits are needed")]
    model: str
    digest: Annotated[str, Text(re.compile(r"[0-9a-f]{64}"), "64 hexadecimal digits are needed")]
    family: str
    n_layers: int
    plan: PlanText
    hidden_size: int
    attn_implementation: str
    span_dtype: str
    codecs: tuple[str, ...]
    limits: SpanLimits
    server_version: str
    numerics: str

    def check(self) -> None:
        """Check the texts that people read."""
        names = (self.model, self.family, self.attn_implementation, self.span_dtype, self.server_version)
        for text in (*names, self.numerics, *self.codecs):
            if len(text) > MAX_INFO_TEXT or not text.isprintable():
                raise MessageError(
                    f"session information has the text {text[:80]!r}: at most {MAX_INFO_TEXT} printable characters "
                    "are accepted"
                )
