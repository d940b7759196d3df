"""Messages: what the two sides of a session say to each other.

Their fields are those of the protobuf messages of the same names in `isthmus.proto`, which says more of each; how they
become bytes is in `isthmus.protocol.encoding`, and what they may say in `isthmus.protocol.validation`.

Theory of operation
    edge                       cloud answers             or
    Attach, Sites, Lease       Status                    Workers (to Attach, where there are several)
    Forward                    ForwardReply              Status, or SiteQuestions before either
    Backward                   BackwardReply             Status, or SiteQuestions before either
    SiteAnswer                 goes on with the call that asked
    FetchList; Fetch           FileList; Blob            Status
    Put; PlugIn                PutReply; Status          Status
    Ping                       Pong
    Goodbye                    nothing                   (the cloud may send one, too)

    An edge reads the files of a file set chunk by chunk (FetchList, then Fetch until it has all), and brings an adapter
    the same way (Put until the cloud holds all, then PlugIn with the list of its files). Both go on where they were
    interrupted.

    An edge may have adapters at sites inside the span. It says once in a session where they are (Sites), and names that
    list in its calls. Such a call may pause: instead of its reply the cloud sends a SiteQuestion, and goes on when it
    has the SiteAnswer. Leased weights are sent before the call (Lease), and their gradients come with the
    BackwardReply. What taps give comes with the ForwardReply.

    A call is named by (step, call, attempt). `call` grows with every new call of an edge and stays the same when the
    call is repeated with a higher `attempt`.
"""

from __future__ import annotations

import enum
import typing
from dataclasses import dataclass, field

from isthmus.protocol.limits import Buffer
from isthmus.protocol.session_info import MAX_INFO as MAX_INFO, SessionInfo as SessionInfo, SpanLimits as SpanLimits
from isthmus.protocol.site_messages import (
    MAX_GROUP as MAX_GROUP,
    MAX_LISTS as MAX_LISTS,
    MAX_SITES as MAX_SITES,
    CallId as CallId,
    Lease as Lease,
    LeasedWeights as LeasedWeights,
    SiteAnswer as SiteAnswer,
    SitePhase as SitePhase,
    SiteQuestion as SiteQuestion,
    Sites as Sites,
)
from isthmus.protocol.tensor_codecs import Payload

MAX_NAME = 128
MAX_TEXT = 1024
MAX_FILE_CHUNK = 8 << 20
"""Most bytes of a file in one message."""
MAX_PUT_FILES = 8
"""Most files of an adapter."""
LINK_BYTES = 16
DIGEST_BYTES = 32


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

    hidden: Payload
    attention_mask: Payload | None = None
    position_ids: Payload | None = None


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
    """

    id: CallId
    keep: bool
    hidden: Payload
    attention_mask: Payload | None
    position_ids: Payload | None
    reply_codec: int
    sites: int = 0
    wanted: bool = True
    lease: int = 0

    @property
    def inputs(self) -> SpanInputs:
        """The three inputs of the span together."""
        return SpanInputs(self.hidden, self.attention_mask, self.position_ids)


@dataclass(frozen=True, slots=True)
class ForwardReply:
    """The span's output `[B, S, h]`, and where the cloud's time went (nanoseconds).

    `taps`: what has come out of the taps of its list, in their order.
    """

    id: CallId
    hidden: Payload
    compute_ns: int
    crypto_ns: int
    queue_ns: int
    taps: tuple[Payload, ...] = ()


@dataclass(frozen=True, slots=True)
class Backward:
    """Run the span backward. `id` is that of its forward call (with its own attempt).

    `gradient` is that of the span's output, `[B, S, h]`. `replay` carries the forward's inputs again, where the cloud
    has lost the forward state. `sites`, `wanted` and `lease` as in the forward.
    """

    id: CallId
    gradient: Payload
    replay: SpanInputs | None
    reply_codec: int
    sites: int = 0
    wanted: bool = True
    lease: int = 0


@dataclass(frozen=True, slots=True)
class BackwardReply:
    """The gradient of the span's input `[B, S, h]`, None unless it was wanted.

    `recomputed`: the forward was run again, as its state was lost. `leased`: the gradients of leased weights, `down`
    and `up` of each site in turn.
    """

    id: CallId
    gradient: Payload | None
    compute_ns: int
    crypto_ns: int
    queue_ns: int
    recomputed: bool
    leased: tuple[Payload, ...] = ()


class FileSet(enum.IntEnum):
    """What an edge may fetch the files of."""

    PARTS = 1
    """The edge's parts of the model."""
    EMULATOR = 2
    """The package with an emulator of the middle layers, if the cloud offers one."""
    ADAPTER = 3
    """The adapter that this edge's own tenant has plugged in, if it has."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Ask for a file of a file set, from `offset` on."""

    file_set: FileSet
    name: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Blob:
    """A chunk of a file: `data` stands at `offset` of `total` bytes; `sha256` is that of the whole file."""

    name: str
    offset: int
    total: int
    sha256: bytes
    data: Buffer = field(repr=False)


@dataclass(frozen=True, slots=True)
class FetchList:
    """Ask which files a file set has."""

    file_set: FileSet


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: its name, its size in bytes, and the SHA-256 of its contents."""

    name: str
    size: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class FileList:
    """The files of a file set."""

    entries: tuple[FileEntry, ...]


@dataclass(frozen=True, slots=True)
class Status:
    """The cloud's answer without a result: `id` names the call, None means the session. `message` is for people."""

    code: StatusCode
    id: CallId | None
    message: str

    @classmethod
    def saying(cls, code: StatusCode, id: CallId | None, text: str) -> Status:
        """A status whose text is cut to what a message carries, `MAX_TEXT` bytes of UTF-8."""
        return cls(code, id, text.encode(errors="replace")[:MAX_TEXT].decode(errors="ignore"))


@dataclass(frozen=True, slots=True)
class Ping:
    """Ask for a sign of life."""

    nonce: int


@dataclass(frozen=True, slots=True)
class Pong:
    """The sign of life, with the ping's number.

    `peak_bytes`: the cloud's estimate of what the largest call of this session so far takes while it is computed; 0
    before the first. It says nothing of other tenants.
    """

    nonce: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Goodbye:
    """This side ends the session on purpose. A stream that ends without it was cut."""

    reason: str


@dataclass(frozen=True, slots=True)
class Account:
    """Whose work a pipeline's stage passes on: the edge's tenant, and its weight against the others', 1 or more."""

    tenant: str
    weight: int


@dataclass(frozen=True, slots=True)
class Attach:
    """The edge's first message: which of its links this is (16 random bytes, the same after every reconnect).

    The cloud ends an older session of the same edge and link, and counts the session against the tenant's quota.
    `interactive`: whether somebody waits for the session's calls, which then come before training. `deadline_ms`:
    within how many milliseconds a call without sites has to begin, or else is refused; 0 for no deadline.
    `settled`: the edge was sent here, or cannot reach where it was sent, and is not to be sent elsewhere. `account`:
    the tenant that a pipeline's stage attaches for; nobody but a stage may name one.
    """

    link: bytes
    interactive: bool = False
    deadline_ms: int = 0
    settled: bool = False
    account: Account | None = None


@dataclass(frozen=True, slots=True)
class Workers:
    """The workers of this cloud, `host:port` each, any of which may take the edge's sessions.

    `go_to`: the one to go to instead, as it has fewer sessions; the session ends. Empty where the edge is
    attached here.
    """

    addresses: tuple[str, ...]
    go_to: str = ""


@dataclass(frozen=True, slots=True)
class Put:
    """A chunk of a file of an adapter: `data` stands at `offset` of `total` bytes; `sha256` is the whole file's.

    Without data it asks how much of the file the cloud holds.
    """

    name: str
    offset: int
    total: int
    sha256: bytes
    data: Buffer = field(repr=False)


@dataclass(frozen=True, slots=True)
class PutReply:
    """How many bytes of a file the cloud holds now, from its beginning on: the next chunk stands there."""

    name: str
    sha256: bytes
    held: int


@dataclass(frozen=True, slots=True)
class PlugIn:
    """Plug in the adapter that these files are, which the cloud holds whole. It takes the place of an older one."""

    entries: tuple[FileEntry, ...]


EdgeMessage = (
    Forward | Backward | Fetch | FetchList | Ping | Goodbye | Attach | Put | PlugIn | Sites | SiteAnswer | Lease
)
CloudMessage = (
    ForwardReply | BackwardReply | Blob | FileList | Status | Pong | Goodbye | PutReply | SiteQuestion | Workers
)
Message = EdgeMessage | CloudMessage

Timed = ForwardReply | BackwardReply | SiteQuestion
"""What says where the cloud's time went."""

EDGE_SENDS: tuple[type[Message], ...] = typing.get_args(EdgeMessage)
CLOUD_SENDS: tuple[type[Message], ...] = typing.get_args(CloudMessage)
