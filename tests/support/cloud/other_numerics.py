"""A replay by another processor, whose answers are nearly the same."""

from __future__ import annotations

from dataclasses import replace

from isthmus.edge.audit.replay import Replayer
from isthmus.edge.witness.audit_sample import SampledCall
from isthmus.protocol import messages as m
from isthmus.protocol.tensor_codecs import decode, encode


class Elsewhere:
    """Computes as another processor does: nearly the same."""

    def __init__(self, inner: Replayer, numerics: str, error: float) -> None:
        self._inner, self._numerics, self._error = inner, numerics, error

    def numerics(self) -> str:
        return self._numerics

    def answer(self, call: SampledCall) -> m.Message:
        found = self._inner.answer(call)
        assert isinstance(found, m.ForwardReply | m.BackwardReply)
        name, payload = ("hidden", found.hidden) if isinstance(found, m.ForwardReply) else ("gradient", found.gradient)
        assert payload is not None
        shifted = decode(payload) * (1 + self._error)
        return replace(found, **{name: encode(shifted, "fp32", payload.role)})
