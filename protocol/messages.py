"""Messages: what the two sides of a session say to each other.

Their fields are those of the protobuf messages of the same names in `isthmus.proto`, which says more of each. A field's
annotation says what it may hold: a `Size`, a `Text`, or the role of hidden states. What the fields say together is
checked by `check`. `isthmus.protocol.encoding` makes bytes of messages, and applies both before a message is sent and
after it was read.

Theory of operation
    edge                       cloud answers             or
    Attach, Sites, Lease       Status                    Workers (to Attach, where there are several)
    Forward                    ForwardReply              Status, or SiteQuestions before either
    Backward                   BackwardReply             Status, or SiteQuestions before either
    Decode                     ForwardReply              Status, or CacheLost
    SiteAnswer                 goes on with the call that asked
    FetchList; Fetch           FileList; Blob            Status
    Put; PlugIn                PutReply; Status          Status
    SignTranscript             SignedTranscript          Status (the edge has asked for no transcript, or counts others)
    Ping                       Pong
    Goodbye                    nothing                   (the cloud may send one, too)

    An edge reads the files of a file set chunk by chunk (FetchList, then Fetch until it has all), and brings an adapter
    the same way (Put until the cloud holds all, then PlugIn with the list of its files). Both go on where they were
    interrupted.

    An edge may have adapters at sites inside the span. It says once in a session where they are (Sites), and names that
    list in its calls. Such a call may pause: instead of its reply the cloud sends a SiteQuestion, and goes on when it
    has the SiteAnswer. Leased weights are sent before the call (Lease), and their gradients come with the
    BackwardReply. What taps give comes with the ForwardReply.

    While text is generated, the cloud keeps the keys and values of past tokens, and the edge the hidden states that
    they were made of. Each Decode says after how many positions its tokens come: a longer cache is cropped, and where
    it is shorter, the cloud answers with CacheLost, and the edge sends what is missing again.

    A call is named by (step, call, attempt). `call` grows with every new call of an edge and stays the same when the
    call is repeated with a higher `attempt`.
"""

from __future__ import annotations

import enum
import typing
from dataclasses import dataclass
from typing import Annotated

from isthmus.common.errors import MessageError
from isthmus.protocol.file_messages import (
    MAX_FILE_CHUNK as MAX_FILE_CHUNK,
    MAX_PACKAGES as MAX_PACKAGES,
    MAX_PUT_FILES as MAX_PUT_FILES,
    PACKAGE_NAME as PACKAGE_NAME,
    PACKAGE_NAME_NEEDS as PACKAGE_NAME_NEEDS,
    Blob as Blob,
    Fetch as Fetch,
    FetchList as FetchList,
    FileEntry as FileEntry,
    FileList as FileList,
    FileSet as FileSet,
    PlugIn as PlugIn,
    Put as Put,
    PutReply as PutReply,
)
from isthmus.protocol.limits import MAX_NAME as MAX_NAME, Size
from isthmus.protocol.session_info import (
    MAX_INFO as MAX_INFO,
    PlanText,
    SessionInfo as SessionInfo,
    SpanLimits as SpanLimits,
)
from isthmus.protocol.session_messages import (
    LINK_BYTES as LINK_BYTES,
    MAX_TEXT as MAX_TEXT,
    Account as Account,
    Attach as Attach,
    ForPeople,
    Goodbye as Goodbye,
    Ping as Ping,
    Pong as Pong,
    SignedTranscript as SignedTranscript,
    SignTranscript as SignTranscript,
    Workers as Workers,
    cut as cut,
)
from isthmus.protocol.site_messages import (
    MAX_GROUP as MAX_GROUP,
    MAX_LISTS as MAX_LISTS,
    MAX_RANK as MAX_RANK,
    MAX_SITES as MAX_SITES,
    CallId as CallId,
    Lease as Lease,
    LeasedWeights as LeasedWeights,
    SiteAnswer as SiteAnswer,
    SitePhase as SitePhase,
    SiteQuestion as SiteQuestion,
    Sites as Sites,
    check_lora,
)
from isthmus.protocol.tensor_codecs import CODECS, Payload, Role, codec_by_id

MAX_CACHES = 64
"""Sequences, or batches of such, that a session generates at a time."""
MAX_ROWS = 4096
"""Sequences of a batch, at most."""
MAX_BLOCK = 512
"""Tokens that attend at once in an exact call, at most: a longer prompt is several blocks, on any worker."""
MAX_BLOCKS = 8192
"""Their lengths, and the rows, fit into a header."""

Activation = Annotated[Payload, Role.ACTIVATION]
"""Hidden states, `[B, S, width]`, by a codec for them."""
Gradient = Annotated[Payload, Role.GRADIENT]
"""The gradient of such."""


class StatusCode(enum.IntEnum):
    """Why a call or a session was not served (or, in the handshake's last message, that it was)."""

    OK = 0
    DRAINING = 1
    """The worker finishes its calls and takes no new session: connect again."""
    ACTIVATIONS_LOST = 2
    """The forward state of a backward call is gone: send the call again with its inputs."""
    BAD_REQUEST = 3
    OVER_QUOTA = 4
    NON_FINITE = 5
    """What the call brought, or the span's output or gradient, has NaN or infinite values."""
    INTERNAL = 7
    NOT_ENROLLED = 8
    TOO_LATE = 9
    """The call had not begun when the session's deadline for it passed."""


@dataclass(frozen=True, slots=True)
class SpanInputs:
    """The span's inputs: hidden states `[B, S, h]`, mask `[B, S]` or None, position ids `[B or 1, S]` or None."""

    hidden: Activation
    attention_mask: Payload | None = None
    position_ids: Payload | None = None

    def check(self, before: int = 0) -> None:
        """Check that mask and positions are such, and fit the hidden states and the positions before them."""
        batch, length, _ = self.hidden.shape
        for name, payload, codec, batches, long in (
            ("attention mask", self.attention_mask, "mask", (batch,), before + length),
            ("position ids", self.position_ids, "int32", (1, batch), length),
        ):
            if payload is None:
                continue
            fits = len(payload.shape) == 2 and payload.shape[0] in batches and payload.shape[1] == long
            if not fits or payload.codec != CODECS[codec].id or payload.role != Role.INDEX:
                raise MessageError(
                    f"{name} of shape {list(payload.shape)}, codec id {payload.codec} do not fit hidden states of "
                    f"shape {list(self.hidden.shape)}"
                )


def _check_call(call: Forward | Backward | Decode) -> None:
    if not codec_by_id(call.reply_codec).activation:
        raise MessageError(f"codec id {call.reply_codec} is not one for activations")
    if call.lease and not call.sites:
        raise MessageError(f"a call with lease {call.lease} and no list of sites is refused: a lease is of a list")


@dataclass(frozen=True, slots=True)
class Forward:
    """Run the span forward.

    Attributes:
        id: the call's name.
        keep: whether a backward call follows, so that the cloud keeps the forward state.
        hidden: `[B, S, h]`.
        attention_mask: `[B, S]`.
        position_ids: `[B or 1, S]`.
        reply_codec: the id of the codec that the reply shall have.
        sites: the number of the list of sites that the call visits; 0 for none.
        wanted: whether the backward call will want the gradient of the span's input.
        lease: the number of the leased weights; 0 for none.
        plan: the split plan of an offered package, whose middle is run in the span's place; None for the span.
    """

    id: CallId
    keep: bool
    hidden: Activation
    attention_mask: Payload | None
    position_ids: Payload | None
    reply_codec: int
    sites: int = 0
    wanted: bool = True
    lease: int = 0
    plan: PlanText | None = None

    @property
    def inputs(self) -> SpanInputs:
        """The three inputs of the span together."""
        return SpanInputs(self.hidden, self.attention_mask, self.position_ids)

    def check(self) -> None:
        """Check that the inputs fit each other, and the call's numbers."""
        self.inputs.check()
        _check_call(self)
        if self.plan is not None and (self.keep or self.sites):
            raise MessageError(f"a forward of the split {self.plan} is refused: it keeps nothing and visits no sites")


@dataclass(frozen=True, slots=True)
class ForwardReply:
    """The span's output `[B, S, h]`, and where the cloud's time went (nanoseconds).

    `taps`: what has come out of the taps of its list, in their order.
    """

    id: CallId
    hidden: Activation
    compute_ns: int
    crypto_ns: int
    queue_ns: int
    taps: Annotated[tuple[Activation, ...], Size(0, MAX_SITES)] = ()

    def check(self) -> None:
        """Check that the taps are of as many positions as the hidden states."""
        for tap in self.taps:
            if tap.shape[:2] != self.hidden.shape[:2]:
                raise MessageError(
                    f"a tap of shape {list(tap.shape)} does not fit hidden states of shape {list(self.hidden.shape)}"
                )


@dataclass(frozen=True, slots=True)
class Decode:
    """Run the span over the next tokens of some sequences, whose keys and values the cloud keeps.

    Attributes:
        id: the call's name. A repeated call has the effect of one.
        cache: the number of the cache.
        start: positions before this call. What the cache has besides is forgotten.
        rows: the cache's rows to go on with, in this order; none for all as they are.
        blocks: to be exact: how many tokens attend at once, one block after another. None for fast.
        hidden: of the tokens, `[B, S, h]`.
        attention_mask: `[B, start + S]`.
        position_ids: of the tokens, `[B or 1, S]`.
        reply_codec: as in a forward.
        sites: the number of a list of sites whose weights are leased; 0 for none.
        lease: the number of the leased weights; 0 for none.
    """

    id: CallId
    cache: Annotated[int, Size(0, MAX_CACHES - 1)]
    start: int
    rows: Annotated[tuple[int, ...], Size(0, MAX_ROWS)]
    blocks: Annotated[tuple[Annotated[int, Size(1, MAX_BLOCK)], ...], Size(0, MAX_BLOCKS)]
    hidden: Activation
    attention_mask: Payload | None
    position_ids: Payload | None
    reply_codec: int
    sites: int = 0
    lease: int = 0

    @property
    def inputs(self) -> SpanInputs:
        """The three inputs of the span together."""
        return SpanInputs(self.hidden, self.attention_mask, self.position_ids)

    def check(self) -> None:
        """Check that the inputs, the rows and the blocks fit each other, and the call's numbers."""
        self.inputs.check(self.start)
        _check_call(self)
        batch, length, _ = self.hidden.shape
        if self.rows and len(self.rows) != batch:
            raise MessageError(f"{len(self.rows)} rows of a cache do not fit hidden states of {batch} sequences")
        if self.blocks and sum(self.blocks) != length:
            raise MessageError(f"blocks of {sum(self.blocks)} tokens do not fit hidden states of {length}")


@dataclass(frozen=True, slots=True)
class CacheLost:
    """The cache has only `have` positions, which are fewer than the call begins with."""

    id: CallId
    have: int


@dataclass(frozen=True, slots=True)
class Backward:
    """Run the span backward. `id` is that of its forward call (with its own attempt).

    `gradient` is that of the span's output, `[B, S, h]`. `replay` carries the forward's inputs again, where the cloud
    has lost the forward state. `sites`, `wanted` and `lease` as in the forward.
    """

    id: CallId
    gradient: Gradient
    replay: SpanInputs | None
    reply_codec: int
    sites: int = 0
    wanted: bool = True
    lease: int = 0

    def check(self) -> None:
        """Check that what is replayed has the gradient's shape, and the call's numbers."""
        _check_call(self)
        if self.replay is not None and self.replay.hidden.shape != self.gradient.shape:
            raise MessageError(
                f"gradient {list(self.gradient.shape)} and hidden states {list(self.replay.hidden.shape)} differ in "
                "shape"
            )


@dataclass(frozen=True, slots=True)
class BackwardReply:
    """The gradient of the span's input `[B, S, h]`, None unless it was wanted.

    `recomputed`: the forward was run again, as its state was lost. `leased`: the gradients of leased weights, `down`
    and `up` of each site in turn.
    """

    id: CallId
    gradient: Gradient | None
    compute_ns: int
    crypto_ns: int
    queue_ns: int
    recomputed: bool
    leased: Annotated[tuple[Payload, ...], Size(0, 2 * MAX_SITES)] = ()

    def check(self) -> None:
        """Check that the gradients of leased weights come in pairs."""
        if len(self.leased) % 2:
            raise MessageError(f"{len(self.leased)} gradients of leased matrices are refused: a site has two")
        for down, up in zip(self.leased[::2], self.leased[1::2], strict=True):
            check_lora(down, up, Role.GRADIENT)


@dataclass(frozen=True, slots=True)
class Status:
    """The cloud's answer without a result: `id` names the call, None means the session. `message` is for people."""

    code: StatusCode
    id: CallId | None
    message: ForPeople

    @classmethod
    def saying(cls, code: StatusCode, id: CallId | None, text: str) -> Status:
        """A status whose text is cut to what a message carries."""
        return cls(code, id, cut(text))


EdgeMessage = (
    Forward
    | Backward
    | Decode
    | Fetch
    | FetchList
    | Ping
    | Goodbye
    | Attach
    | Put
    | PlugIn
    | Sites
    | SiteAnswer
    | Lease
    | SignTranscript
)
CloudMessage = (
    ForwardReply
    | BackwardReply
    | CacheLost
    | Blob
    | FileList
    | Status
    | Pong
    | Goodbye
    | PutReply
    | SiteQuestion
    | Workers
    | SignedTranscript
)
Message = EdgeMessage | CloudMessage

Timed = ForwardReply | BackwardReply | SiteQuestion
"""What says where the cloud's time went."""

EDGE_SENDS: tuple[type[Message], ...] = typing.get_args(EdgeMessage)
CLOUD_SENDS: tuple[type[Message], ...] = typing.get_args(CloudMessage)
