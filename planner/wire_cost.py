"""What a call costs on the wire: the bytes of its frames, and the round trips. Pure.

Messages are packed, with empty tensors of the right shapes, and their frames counted, so the bytes are those that the
edge's own meter counts: prefix, sealed header, sealed chunks. What gRPC, HTTP/2, TCP and TLS add is not counted; it is
about 1 %. A header's length does not depend on the numbers in it, but on how many tensors it describes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.protocol.encoding import body_bytes, pack
from isthmus.protocol.limits import DEFAULT_LIMITS
from isthmus.protocol.messages import (
    MAX_SITES,
    Backward,
    BackwardReply,
    CallId,
    Decode,
    Forward,
    ForwardReply,
    Lease,
    LeasedWeights,
    Message,
    SiteAnswer,
    SitePhase,
    SiteQuestion,
)
from isthmus.protocol.secure.framing import PREFIX, TAG, chunk_count
from isthmus.protocol.tensor_codecs import CODECS, Payload, Role, codec_id

_CALL = CallId(1, 1)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What crosses the wire.

    Attributes:
        up: Bytes to the cloud.
        down: Bytes from the cloud.
        round_trips: Questions with their answers.
        elements: How many numbers each codec has to encode and decode.
    """

    up: float = 0
    down: float = 0
    round_trips: float = 0
    elements: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> float:
        """Bytes in both directions."""
        return self.up + self.down

    def __add__(self, other: Traffic) -> Traffic:
        round_trips = self.round_trips + other.round_trips
        return Traffic(self.up + other.up, self.down + other.down, round_trips, self.elements + other.elements)

    def __mul__(self, factor: float) -> Traffic:
        elements = Counter({codec: round(count * factor) for codec, count in self.elements.items()})
        return Traffic(self.up * factor, self.down * factor, self.round_trips * factor, elements)


@dataclass(frozen=True, slots=True)
class Wire:
    """Counts the traffic of calls on one micro-batch.

    Args:
        batch: Sequences, B.
        length: Token positions of each, S, padding included.
        hidden: Width h of the hidden states.
    """

    batch: int
    length: int
    hidden: int
    codecs: WireCodecs

    def forward(self, *, taps: Sequence[int] = ()) -> Traffic:
        """The span's forward: hidden states and mask up, hidden states down, and `taps` (widths) beside them."""
        up, down = self._payload("forward_up", self.hidden), self._payload("forward_down", self.hidden)
        mask = Payload(CODECS["mask"].id, Role.INDEX, (self.batch, self.length), (bytes(-(-self._tokens // 8)),))
        question = Forward(_CALL, True, up, mask, None, codec_id(self.codecs.forward_down))
        reply = ForwardReply(_CALL, down, 0, 0, 0, tuple(self._payload("forward_down", width) for width in taps))
        crossing = Traffic(frame_bytes(*sizes(question)), frame_bytes(*sizes(reply)), 1)
        return (
            crossing + self._handled("forward_up", [self.hidden]) + self._handled("forward_down", [self.hidden, *taps])
        )

    def decode(self) -> Traffic:
        """The next tokens of texts whose cache the cloud has: hidden states and positions up, hidden states down."""
        up, down = self._payload("forward_up", self.hidden), self._payload("forward_down", self.hidden)
        positions = Payload(CODECS["int32"].id, Role.INDEX, (1, self.length), (bytes(4 * self.length),))
        question = Decode(_CALL, 0, 0, (), (), up, None, positions, codec_id(self.codecs.forward_down))
        crossing = Traffic(frame_bytes(*sizes(question)), frame_bytes(*sizes(ForwardReply(_CALL, down, 0, 0, 0))), 1)
        return crossing + self._handled("forward_up", [self.hidden]) + self._handled("forward_down", [self.hidden])

    def backward(self, *, wanted: bool = True) -> Traffic:
        """The span's backward: a gradient up and, if one is `wanted` below the span, a gradient down."""
        up = self._payload("backward_up", self.hidden)
        down = self._payload("backward_down", self.hidden) if wanted else None
        question = Backward(_CALL, up, None, codec_id(self.codecs.backward_down), wanted=wanted)
        reply = BackwardReply(_CALL, down, 0, 0, 0, False)
        crossing = Traffic(frame_bytes(*sizes(question)), frame_bytes(*sizes(reply)), 1)
        return (
            crossing
            + self._handled("backward_up", [self.hidden])
            + self._handled("backward_down", [self.hidden] * wanted)
        )

    def pause(self, direction: str, sites: int, down: Sequence[int], up: Sequence[int]) -> Traffic:
        """One stop inside the span: the cloud asks with tensors `[B, S, width]`, the edge answers with others.

        Args:
            direction: "forward" or "backward".
            sites: How many sites the question is about.
            down: Widths of the question's tensors.
            up: Widths of the answer's.
        """
        asked, answered = f"{direction}_down", f"{direction}_up"
        question = frame_bytes(question_header(sites, len(down)), sum(self._body(asked, width) for width in down))
        answer = frame_bytes(answer_header(len(up)), sum(self._body(answered, width) for width in up))
        return Traffic(answer, question, 1) + self._handled(asked, down) + self._handled(answered, up)

    def leasing(self, shapes: Sequence[tuple[int, int]]) -> Traffic:
        """The weights of leased sites up, two matrices of each in fp32, and about as many bytes of gradients down."""
        body = sum(body_bytes("fp32", (rows, columns)) for rows, columns in shapes)
        one_way = frame_bytes(lease_header(len(shapes) // 2), body)
        return Traffic(one_way, one_way)

    @property
    def _tokens(self) -> int:
        return self.batch * self.length

    def _codec(self, direction: str) -> str:
        name: str = getattr(self.codecs, direction)
        return name

    def _payload(self, direction: str, width: int) -> Payload:
        codec, shape = CODECS[self._codec(direction)], (self.batch, self.length, width)
        role = Role.ACTIVATION if direction.startswith("forward") else Role.GRADIENT
        return Payload(codec.id, role, shape, tuple(bytes(size) for size in codec.sizes(shape)))

    def _body(self, direction: str, width: int) -> int:
        return body_bytes(self._codec(direction), (self.batch, self.length, width))

    def _handled(self, direction: str, widths: Sequence[int]) -> Traffic:
        return Traffic(elements=Counter({self._codec(direction): self._tokens * sum(widths)}))


@cache
def question_header(sites: int, tensors: int) -> int:
    """Header bytes of a question about `sites` with so many tensors."""
    phase = SitePhase.FORWARD if tensors else SitePhase.AGAIN
    return sizes(SiteQuestion(_CALL, phase, tuple(range(sites)), (_one_number(),) * tensors, 0, 0, 0))[0]


@cache
def answer_header(tensors: int) -> int:
    """Header bytes of an answer with so many tensors."""
    return sizes(SiteAnswer(_CALL, (_one_number(),) * tensors))[0]


@cache
def lease_header(sites: int) -> int:
    """Header bytes of leased weights for so many sites, in as many messages as they take."""
    one = Payload(codec_id("fp32"), Role.ACTIVATION, (1, 1), (bytes(4),))
    whole, rest = divmod(sites, MAX_SITES)
    counts = [MAX_SITES] * whole + [rest] * bool(rest)
    return sum(sizes(Lease(1, 1, (LeasedWeights(one, one, 1.0),) * count))[0] for count in counts)


def sizes(message: Message) -> tuple[int, int]:
    """Bytes of a message's header and of its body, padding included."""
    header, body = pack(message)
    return len(header), sum(len(buffer) for buffer in body)


def frame_bytes(header: int, body: int) -> int:
    """Bytes of the frames of a message with a header and a body of these sizes, as the record layer cuts it."""
    chunks = chunk_count(body, DEFAULT_LIMITS.chunk_bytes)
    tags = math.ceil(body / DEFAULT_LIMITS.chunk_bytes)
    return chunks * PREFIX.size + header + TAG + body + tags * TAG


def _one_number() -> Payload:
    return Payload(codec_id("fp32"), Role.ACTIVATION, (1, 1, 1), (bytes(4),))
