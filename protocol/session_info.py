"""What the cloud tells an edge about the session, in the handshake's last flight."""

from __future__ import annotations

from dataclasses import dataclass

MAX_INFO = 16 * 1024
"""Most bytes of a session's information."""


@dataclass(frozen=True, slots=True)
class SpanLimits:
    """What the cloud accepts of one tenant."""

    max_tokens_per_call: int
    max_message_bytes: int
    activation_cache_bytes: int


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """What the cloud tells an edge in the handshake's last message.

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
    """

    session_id: str
    model: str
    digest: str
    family: str
    n_layers: int
    plan: str
    hidden_size: int
    attn_implementation: str
    span_dtype: str
    codecs: tuple[str, ...]
    limits: SpanLimits
    server_version: str
