"""What one call may take of this cloud: shape, positions of the model, tokens, memory, and the size of its answer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from isthmus.backbone.runtime.call_memory import CallShape, Pass
from isthmus.backbone.split.span import check_length
from isthmus.cloud.engine.executor import Executor
from isthmus.cloud.session.site_lists import SiteLists
from isthmus.protocol import messages as m
from isthmus.protocol.limits import Limits
from isthmus.protocol.tensor_codecs import Payload, codec_by_id


@dataclass(slots=True)
class CallBounds:
    """Checks the calls of one session, before anything of them is decoded.

    Args:
        session_id: the session's id, which keys its entries in the activation cache.
        executor: the span that every session of this worker shares.
        lists: the session's lists of sites.
        hidden_size: size of the last dimension of hidden states.
        max_tokens: largest batch x sequence of one call.
        limits: what the session accepts.

    Attributes:
        peak_bytes: the largest estimate so far of the memory that one of its calls takes while it is computed.
    """

    session_id: bytes
    executor: Executor
    lists: SiteLists
    hidden_size: int
    max_tokens: int
    limits: Limits
    peak_bytes: int = 0

    def check_shape(self, hidden: Payload, *, before: int = 0) -> None:
        """Check that a call fits the model, and has no more tokens than this cloud takes at a time.

        This comes before its memory is checked: what a call of a wrong shape would take only confuses.

        Args:
            hidden: its hidden states.
            before: token positions that a decode call has in its cache.

        Raises:
            ConfigError: the model is not made for so long a sequence.
            ValueError: its width is another one, or it has too many tokens.
        """
        batch, sequence, width = hidden.shape
        if width != self.hidden_size:
            raise ValueError(
                f"hidden states of shape {[batch, sequence, width]} do not fit [batch, sequence, {self.hidden_size}]"
            )
        if batch * sequence > self.max_tokens:
            raise ValueError(
                f"{batch} x {sequence} tokens in one call; this cloud takes at most {self.max_tokens}: "
                "send less at a time"
            )
        check_length(self.executor.host.span.longest, before + sequence)

    def check_needed(self, needed: int, hidden: Payload, most: float, pausing: str = "") -> None:
        """Check that a call can be computed within so many bytes of memory. Raises ValueError."""
        self.peak_bytes = max(self.peak_bytes, needed)
        if needed > most:
            batch, sequence, _ = hidden.shape
            raise ValueError(
                f"a call of {batch} x {sequence} tokens takes about {needed} bytes of memory, and this cloud "
                f"computes within {self.executor.compute_bytes:.0f}{pausing}: send fewer or shorter sequences at a time"
            )

    def check_memory(self, message: m.Forward | m.Backward) -> None:
        """Check that a call can be computed within the worker's memory, and its answer be sent. Raises ValueError."""
        shape = self.call_shape(message)
        if shape is None:
            return
        hidden = message.hidden if isinstance(message, m.Forward) else message.gradient
        pausing = ", half of it for one that may pause" if message.sites else ""
        most = self.executor.compute_bytes / (2 if message.sites else 1)
        self.check_needed(self.most_bytes(shape), hidden, most, pausing)
        if isinstance(message, m.Forward) and message.sites:
            self._check_answer(message, shape)

    def _check_answer(self, message: m.Forward, shape: CallShape) -> None:
        """Check that the output and what the taps give fit into one message. Raises ValueError."""
        tap_widths = self.lists.of(message.sites).tap_widths
        codec, positions = codec_by_id(message.reply_codec), (shape.batch, shape.length)
        answer = sum(sum(codec.sizes((*positions, width))) for width in (self.hidden_size, *tap_widths))
        if answer > self.limits.max_message_bytes:
            raise ValueError(
                f"the answer with what {len(tap_widths)} taps give of {shape.batch} x {shape.length} tokens takes "
                f"{answer} bytes, and a message {self.limits.max_message_bytes}: tap fewer layers, or narrower, or "
                "send less at a time"
            )

    def most_bytes(self, shape: CallShape) -> int:
        """Bytes of a call's larger pass: a kept forward has to leave room for its backward, which takes more."""
        return self.executor.memory.of(
            shape if shape.what == Pass.FORWARD else dataclasses.replace(shape, what=Pass.BACKWARD)
        )

    def call_shape(self, message: m.Forward | m.Backward) -> CallShape | None:
        """What a call's memory depends on; None where it has too many tokens, or lacks its forward.

        A backward may use the kept forward, or lose it to eviction and use its replay: it counts as masked where either
        of them is.
        """
        batch, sequence, _ = hidden_shape(message)
        if batch * sequence > self.max_tokens:
            return None
        if isinstance(message, m.Forward):
            what, masked = Pass.KEPT_FORWARD if message.keep else Pass.FORWARD, _is_masked(message.inputs)
        else:
            kept_masked = self.executor.cache.is_masked((self.session_id, message.id.call))
            if kept_masked is None and message.replay is None:
                return None  # the edge will be asked to send the input again
            replay_masked = message.replay is not None and _is_masked(message.replay)
            what, masked = Pass.BACKWARD, bool(kept_masked) or replay_masked
        sites = self.lists.find(message.sites) if message.sites else None
        kept, passing = (0, 0) if sites is None else (sites.kept, sites.passing)
        return CallShape(batch, sequence, what, masked, kept, passing)


def hidden_shape(message: m.Forward | m.Backward | m.Decode) -> tuple[int, ...]:
    """The shape `[B, S, h]` of the hidden states that go through the span."""
    return message.gradient.shape if isinstance(message, m.Backward) else message.hidden.shape


def _is_masked(inputs: m.SpanInputs) -> bool:
    """Whether attention may need a mask for them."""
    return inputs.attention_mask is not None or inputs.position_ids is not None
